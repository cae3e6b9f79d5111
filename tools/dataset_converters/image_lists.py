"""Make the lists of a small classification task from folders of images.

A folder per class (as EuroSAT, Resisc45, DTD or Caltech101 are distributed),
or a list of ``file label`` lines, becomes the lists that the configs of
VTAB-1k and few-shot read. Which images are drawn depends on the seed alone.
Benchmarks have fixed selections of their own: where an archive brings its
lists, use those.

Example:
    # 800 to train on, 200 to choose by, the 1,000 of both, the rest to test on
    python tools/dataset_converters/image_lists.py data/eurosat/images
    # the same with the test images of the archive
    python tools/dataset_converters/image_lists.py data/pets/images \\
        --list trainval.txt --test-list test.txt
    # 1 to 16 images per class, three times; half of the images to test on
    python tools/dataset_converters/image_lists.py data/food101/images \\
        --shots 1 2 4 8 16 --seeds 0 1 2 --test-share 0.5
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from converter_utils import (
    IMG_SUFFIXES,
    ConverterError,
    logger,
    read_text,
    run_tool,
)

from lors_plugin.checkpoints.files import write_all

Sample = tuple[str, int]
VAL_SHOTS = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add('images', type=Path, help='folder of a folder per class, or of images')
    add('--list', type=Path, metavar='FILE',
        help='lines of "file label" to draw from, instead of folders')
    add('--test-list', type=Path, metavar='FILE',
        help='lines of "file label" to test on; they are not drawn')
    add('--test-share', type=float, metavar='X',
        help='share of each class to test on (default: all that is not drawn)')
    add('--out-dir', type=Path, metavar='DIR',
        help='where to write the lists (default: beside the images)')
    add('--train', type=int, default=800, metavar='N',
        help='images to train on (default: %(default)s)')
    add('--val', type=int, default=200, metavar='N',
        help='images to choose by (default: %(default)s)')
    add('--shots', type=int, nargs='+', metavar='K',
        help='instead: lists of K images per class')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N',
        help='one list per seed with --shots; the first one otherwise')
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.train, args.val, *(args.shots or [1])) < 1:
        parser.error('--train, --val and --shots are at least 1')
    if args.test_share is not None and not 0 < args.test_share < 1:
        parser.error('--test-share is between 0 and 1')
    return args


def read_list(path: Path, images: Path) -> list[Sample]:
    """Read lines of ``file label``; every image must be there."""
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(' ')
        where = f'{path}, line {number}: {line!r}'
        if not name or not label.isascii() or not label.isdigit():
            raise ConverterError(f'{where} is not a file and a label from 0')
        if not (images / name).is_file():
            raise ConverterError(f'{where}: {images / name} does not exist')
        samples.append((name, int(label)))
    if not samples:
        raise ConverterError(f'{path} is empty')
    return samples


def read_folders(images: Path) -> tuple[list[Sample], list[str]]:
    """Find the images of each class; classes are in alphabetical order."""
    if not images.is_dir():
        raise ConverterError(f'{images} is no folder')
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    samples = []
    for label, folder in enumerate(folders):
        found = sorted(
            path
            for path in folder.rglob('*')
            if path.suffix.lower() in IMG_SUFFIXES
        )
        if not found:
            raise ConverterError(f'{folder} has no images')
        samples += [(p.relative_to(images).as_posix(), label) for p in found]
    if len(folders) < 2:
        raise ConverterError(
            f'{images} has {len(folders)} folders: there must be one per '
            'class, or a --list'
        )
    return samples, [folder.name for folder in folders]


def by_class(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """Sort samples by their label."""
    classes: dict[int, list[Sample]] = {}
    for sample in sorted(samples):
        classes.setdefault(sample[1], []).append(sample)
    return dict(sorted(classes.items()))


def take_test(
    samples: Sequence[Sample], share: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Draw a share of each class; return the rest and what was drawn."""
    rest, test = [], []
    for label, found in by_class(samples).items():
        random.Random(f'test {seed} {label}').shuffle(found)
        size = round(share * len(found))
        test += found[:size]
        rest += found[size:]
    return rest, test


def draw(
    samples: Sequence[Sample], train: int, val: int, seed: int
) -> dict[str, list[Sample]]:
    """Draw lists as VTAB-1k has them, whatever the classes."""
    if len(samples) < train + val:
        raise ConverterError(
            f'{train} and {val} images are asked for, and there are '
            f'{len(samples)}'
        )
    mixed = sorted(samples)
    random.Random(f'lists {seed}').shuffle(mixed)
    first, second = mixed[:train], mixed[train : train + val]
    return {
        f'train{train}': first,
        f'val{val}': second,
        f'train{train}val{val}': first + second,
        'rest': mixed[train + val :],
    }


def draw_shots(
    samples: Sequence[Sample], shots: Sequence[int], seed: int
) -> dict[str, list[Sample]]:
    """Draw ``K`` images of each class; larger lists hold the smaller ones."""
    lists: dict[str, list[Sample]] = {}
    most = max(shots)
    for label, found in by_class(samples).items():
        val = min(VAL_SHOTS, most)
        if len(found) < most + val:
            raise ConverterError(
                f'class {label} has {len(found)} images to draw from, fewer '
                f'than {most} and {val} to choose by'
            )
        random.Random(f'shots {seed} {label}').shuffle(found)
        for count in shots:
            name = f'train_{count}-shot_seed{seed}'
            lists.setdefault(name, []).extend(found[:count])
        lists.setdefault(f'val_seed{seed}', []).extend(
            found[most : most + val]
        )
        lists.setdefault('rest', []).extend(found[most + val :])
    return lists


def make_lists(args: argparse.Namespace) -> None:
    """Draw and write all lists."""
    classes = None
    if args.list:
        samples = read_list(args.list, args.images)
    else:
        samples, classes = read_folders(args.images)
    test = None
    if args.test_list:
        test = read_list(args.test_list, args.images)
        samples = sorted(set(samples) - set(test))
    elif args.test_share:
        samples, test = take_test(samples, args.test_share, args.seeds[0])
    if args.shots and test is None:
        raise ConverterError(
            'lists of several seeds need the same test images: give '
            '--test-list or --test-share'
        )
    if args.shots:
        lists: dict[str, list[Sample]] = {}
        for seed in args.seeds:
            lists.update(draw_shots(samples, args.shots, seed))
    else:
        lists = draw(samples, args.train, args.val, args.seeds[0])
    rest = lists.pop('rest')
    lists['test'] = rest if test is None else test
    if not lists['test']:
        raise ConverterError('no images are left to test on')
    out = args.out_dir or args.images.parent
    texts = {
        out / f'{name}.txt': ''.join(f'{file} {k}\n' for file, k in found)
        for name, found in lists.items()
    }
    if classes is not None:
        texts[out / 'classes.txt'] = '\n'.join(classes) + '\n'
    write_all(
        {
            path: lambda beside, text=text: beside.write_text(
                text, encoding='utf-8'
            )
            for path, text in texts.items()
        }
    )
    for name, found in lists.items():
        number = len({label for _, label in found})
        logger.info('%s: %d images of %d classes', name, len(found), number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_tool(make_lists, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
