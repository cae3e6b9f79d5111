"""Convert YOLO labels (one txt per image) to COCO json.

Each row of a label file is a class number and the centre, width and height of
a box as fractions of the image. An image without label file is background.

Example:
    python tools/dataset_converters/yolo_to_coco.py data/labels/train \
        data/images/train train.json --names data/data.yaml
    python tools/dataset_converters/yolo_to_coco.py FOLDER FOLDER train.json \
        --val-fraction 0.2 --val-out val.json
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml
from converter_utils import (
    IMG_SUFFIXES,
    ConverterError,
    ImageFolder,
    LabelledBox,
    LabelledImage,
    check_classes,
    logger,
    make_parser,
    parse_output,
    read_size,
    read_text,
    run_tool,
    visible_files,
    write_coco_files,
)

NAME_FILES = ('data.yaml', 'data.yml', 'dataset.yaml', 'classes.txt')
NAME_FILES += ('obj.names', 'labels.txt')
# How far rounding may put a box beyond its image.
SLACK = 0.01


def find_names(label_dir: Path, img_dir: Path) -> Path:
    """Find the file that names the classes, near labels or images."""
    for folder in (label_dir.absolute(), img_dir.absolute()):
        for place in (folder, *folder.parents[:2]):
            for name in NAME_FILES:
                if (place / name).is_file():
                    return place / name
    raise ConverterError(
        f'no file with class names ({", ".join(NAME_FILES)}) in {label_dir} '
        'or above; give --names FILE or --classes NAME ...'
    )


def read_names(path: Path) -> list[str]:
    """Read class names in the order of their numbers.

    A yaml file has ``names``, a list or numbers and names; a text file one
    name per line.
    """
    text = read_text(path)
    if path.suffix.lower() in ('.yaml', '.yml'):
        names = _names_in_yaml(text, path)
    else:
        names = [row.strip() for row in text.rstrip().splitlines()]
    check_classes(names, path)
    return names


def _names_in_yaml(text: str, path: Path) -> list[str]:
    try:
        # Values as they are written: `no`, `on` and `001` are names too.
        content = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConverterError(f'{path} is not yaml: {error}') from error
    names = content.get('names') if isinstance(content, dict) else None
    if isinstance(names, dict):
        wanted = [str(i) for i in range(len(names))]
        if set(names) != set(wanted):
            raise ConverterError(
                f'{path}: the keys of `names` are not 0 to {len(names) - 1}'
            )
        names = [names[key] for key in wanted]
    if not isinstance(names, list) or not all(
        isinstance(name, str) for name in names
    ):
        raise ConverterError(f'{path}: `names` is missing or no list of names')
    if content.get('nc', str(len(names))) != str(len(names)):
        raise ConverterError(
            f'{path}: nc={content["nc"]}, but `names` has {len(names)}'
        )
    return [name.strip() for name in names]


def read_row(
    fields: Sequence[str],
    size: tuple[int, int],
    names: Sequence[str],
    polygons: bool = False,
) -> LabelledBox:
    """Read the words of one row of a label file.

    With ``polygons`` a row may be an outline, x and y of three points at
    least, of which the box around it is taken.
    """
    try:
        label, *values = (float(field) for field in fields)
    except ValueError as error:
        raise ConverterError(f'{error}; numbers are wanted') from error
    if not all(map(math.isfinite, (label, *values))):
        raise ConverterError('a number is not finite')
    if label != int(label) or not 0 <= label < len(names):
        raise ConverterError(
            f'class {fields[0]} is not one of 0 to {len(names) - 1}, the '
            f'numbers of {list(names)}'
        )
    outline = len(values) >= 6 and len(values) % 2 == 0
    if len(values) != 4 and not outline:
        raise ConverterError(
            f'{len(fields)} numbers; a label has 5: class, x, y, width, '
            'height (a sixth would be the score of a prediction)'
        )
    if outline and not polygons:
        raise ConverterError(
            f'{len(fields)} numbers, perhaps an outline instead of a box; '
            '--polygons takes the box around each'
        )
    if min(values) < -SLACK or max(values) > 1 + SLACK:
        raise ConverterError(
            f'{" ".join(fields[1:5])}: not within 0 and 1; boxes are '
            'fractions of the image, not pixels'
        )
    if outline:
        x, y = values[::2], values[1::2]
        corners = min(x), min(y), max(x), max(y)
    else:
        x, y, w, h = values
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    # Six digits, as many tools write, place a corner to a hundredth of a
    # pixel; more digits would only be noise of the sum above.
    corners = [round(v * s, 3) for v, s in zip(corners, (*size, *size))]
    return LabelledBox(names[int(label)], tuple(corners))


def read_labels(
    path: Path,
    size: tuple[int, int],
    names: Sequence[str],
    polygons: bool = False,
) -> list[LabelledBox]:
    """Read the boxes of a label file; rows that occur twice count once."""
    boxes, seen = [], set()
    for number, row in enumerate(read_text(path).splitlines(), start=1):
        fields = tuple(row.split())
        if not fields or fields in seen:
            continue
        seen.add(fields)
        try:
            boxes.append(read_row(fields, size, names, polygons))
        except ConverterError as error:
            raise ConverterError(f'{path}, line {number}: {error}') from error
    return boxes


def choose_images(folder: ImageFolder, split: str | Path | None) -> list[Path]:
    """List the images of a split file, or all.

    It has one image per line, a path or a name, with or without suffix.
    """
    if split is None:
        return folder.paths
    chosen = []
    for row in filter(str.strip, read_text(split).splitlines()):
        path = PurePosixPath(row.strip().replace('\\', '/'))
        known = path.suffix.lower() in IMG_SUFFIXES
        found = folder.find(path.stem if known else path.name)
        # Same names in several folders: the end of the path decides.
        for depth in range(1, len(path.parts)):
            parents = path.parts[-depth - 1 : -1]
            near = [p for p in found if p.parts[-depth - 1 : -1] == parents]
            found = near or found
        found = [p for p in found if p.name == path.name] or found
        if len(found) != 1:
            raise ConverterError(
                f'{split}: {row.strip()} fits {len(found)} images of '
                f'{folder.root}, not one'
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def read_yolo(
    label_dir: Path,
    folder: ImageFolder,
    names: Sequence[str],
    split: str | Path | None = None,
    polygons: bool = False,
) -> list[LabelledImage]:
    """Read the labels of all images.

    Label files lie in the same folders as the images or all in one.
    """
    paths = choose_images(folder, split)
    stems = Counter(path.stem for path in paths)
    images, used, tagged = [], set(), 0
    for path in paths:
        size = read_size(path)
        tagged += size.orientation > 1
        image = LabelledImage(path, size.loaded)
        nested = path.relative_to(folder.root).with_suffix('.txt')
        label = label_dir / nested
        if not label.is_file() and stems[path.stem] == 1:
            label = label_dir / nested.name
        if label in used:
            raise ConverterError(f'{label} belongs to {path} and to another')
        if label.is_file():
            used.add(label)
            image.boxes = read_labels(label, size.loaded, names, polygons)
        images.append(image)
    if not used:
        raise ConverterError(
            f'none of {len(images)} images of {folder.root} has a label file '
            f'in {label_dir}'
        )
    if tagged:
        logger.warning(
            '%d photos have an EXIF orientation; their boxes are taken for '
            'those of the photo as the image loader shows it',
            tagged,
        )
    others = [
        path
        for path in visible_files(label_dir, ('.txt',))
        if path not in used and path.name not in NAME_FILES
    ]
    if others and split is None:
        logger.warning(
            '%d label files have no image, the first is %s',
            len(others),
            others[0],
        )
    return images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('Convert YOLO label files to COCO json', 'label_dir')
    parser.add_argument(
        '--names',
        help='file of the class names, data.yaml or one per line (default: '
        f'{", ".join(NAME_FILES)} near the labels)',
    )
    parser.add_argument(
        '--polygons',
        action='store_true',
        help='labels may be outlines; take the box around each',
    )
    args = parse_output(parser, argv)
    if args.classes and args.names:
        parser.error('give either --classes or --names')
    return args


def convert(args: argparse.Namespace) -> None:
    """Convert and write, as the command line says."""
    folder, label_dir = ImageFolder(args.img_dir), Path(args.label_dir)
    if not label_dir.is_dir():
        raise ConverterError(f'the label folder {label_dir} does not exist')
    if args.classes:
        names = args.classes
        check_classes(names, '--classes')
    else:
        path = Path(args.names or find_names(label_dir, folder.root))
        names = read_names(path)
        logger.info('class names of %s', path)
    images = read_yolo(label_dir, folder, names, args.split, args.polygons)
    write_coco_files(images, folder.root, names, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(convert, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
