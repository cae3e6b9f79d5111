"""Repair a COCO annotation file that MMDetection cannot read as it is.

Example:
    python tools/dataset_converters/repair_coco.py train.json repaired.json

A byte order mark goes, annotations are numbered, ids that are texts become
those of the images and categories they mean, texts become numbers, ``area``
and ``iscrowd`` are added where they lack, and of two categories of the same
name, such as a group and its only class, the one with more boxes stays and
has the other's boxes. What cannot be made up for is refused.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from converter_utils import (
    ConverterError,
    logger,
    read_size,
    read_text,
    run_tool,
    write_json,
)

from lors_plugin.engine.coco_file import Tally, inspect, is_number

PARTS = ('images', 'categories', 'annotations')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('file', help='annotation file to repair')
    parser.add_argument('out', help='file to write')
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        default=(),
        help='categories that come first, in this order, as in the other '
        'files of the data set; by default their order stays',
    )
    parser.add_argument(
        '--images',
        metavar='FOLDER',
        help='folder of the pictures, to take `width` and `height` from',
    )
    return parser.parse_args(argv)


def read_lists(path: str) -> dict:
    """Read a file with lists of objects; ``annotations`` may be missing."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ConverterError(f'{path} does not exist') from error
    except (ValueError, RecursionError) as error:
        raise ConverterError(f'{path} is not JSON: {error}') from error
    if isinstance(content, dict):
        content.setdefault('annotations', [])
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list)
        and all(isinstance(entry, dict) for entry in content[part])
        for part in PARTS
    ):
        raise ConverterError(
            f'{path} has no lists of objects `images`, `annotations` and '
            '`categories`'
        )
    return content


def repair_annotation(item: dict, images: dict, categories: dict) -> None:
    """Repair an annotation; ids are found by their text.

    Raises:
        KeyError, TypeError, ValueError: If it cannot be repaired.
    """
    item['image_id'] = images[str(item['image_id'])]
    item['category_id'] = categories[str(item['category_id'])]
    if item.get('ignore'):
        return
    item['bbox'] = [float(value) for value in item['bbox']]
    _, _, width, height = item['bbox']
    item['area'] = float(item.get('area') or 0) or width * height
    item['iscrowd'] = int(item.get('iscrowd') or 0)


def merge_categories(content: dict) -> None:
    """Let one category of each name stay, the one with most boxes."""
    counts = Counter(a['category_id'] for a in content['annotations'])
    stays = {}
    for category in content['categories']:
        first = stays.setdefault(category.get('name'), category)
        if counts[category['id']] > counts[first['id']]:
            stays[category.get('name')] = category
    names = {c['id']: c.get('name') for c in content['categories']}
    for item in content['annotations']:
        item['category_id'] = stays[names[item['category_id']]]['id']
    content['categories'] = [
        c for c in content['categories'] if c is stays[c.get('name')]
    ]


def add_sizes(images: Sequence[dict], folder: str) -> None:
    """Read the sizes that are missing or no numbers from the pictures."""
    for image in images:
        stated = (image.get('width'), image.get('height'))
        if not all(is_number(value) and value > 0 for value in stated):
            size = read_size(Path(folder, str(image.get('file_name'))))
            image['width'], image['height'] = size.loaded


def repair_content(content: dict, args: argparse.Namespace) -> Tally:
    """Repair what was read in place; return what cannot be repaired."""
    faults, ids = Tally(), []
    for part in PARTS[:2]:
        for number, entry in enumerate(content[part], 1):
            if not isinstance(entry.get('id'), (int, float, str)):
                faults.add(f'{part} without `id`', f'no. {number}')
        ids.append({str(e.get('id')): e.get('id') for e in content[part]})
    for number, item in enumerate(content['annotations'], 1):
        name = f'annotation {item.get("id", f"no. {number}")}'
        item['id'] = number
        try:
            repair_annotation(item, *ids)
        except KeyError as error:
            reason = 'annotations lack a field, or the entry of an id'
            faults.add(reason, f'{name}: {error}')
        except (TypeError, ValueError) as error:
            reason = 'annotations have a value that is no number'
            faults.add(reason, f'{name}: {error}')
    if not faults:
        merge_categories(content)
        order = {name: number for number, name in enumerate(args.classes)}
        content['categories'].sort(
            key=lambda c: order.get(c.get('name'), len(order))
        )
    return faults


def repair(args: argparse.Namespace) -> None:
    """Repair a file, check the result and write it."""
    content = read_lists(args.file)
    faults = repair_content(content, args)
    if not faults:
        if args.images is not None:
            add_sizes(content['images'], args.images)
        report = inspect(content)
        faults = report.faults
    if faults:
        lines = '\n'.join(f'  {line}' for line in faults.lines())
        raise ConverterError(
            f'{args.file} cannot be repaired, and nothing was written:\n'
            f'{lines}'
        )
    write_json(content, args.out)
    names = [c['name'] for c in content['categories']]
    logger.info('%s: %s', args.out, report.line(names))
    logger.info('its classes in order: %s', ', '.join(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    return run_tool(repair, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
