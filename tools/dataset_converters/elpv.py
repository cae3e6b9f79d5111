"""Make a classification set of solar cells: defective, mono or poly.

2,624 photos (300x300, electroluminescence) of the package ``elpv-dataset``
(data CC BY-NC-SA 4.0: not for commercial use). Experts gave every cell a
probability of a defect; only those they were sure of, 0 and 1, are taken. The
package does not say which cells come from the same module, so cells of one
module may be on both sides of the split.

The split is always the same, and stratified by defect and type: 800 cells to
train on, 200 to choose by, 1,223 to test on. Three tasks share the cells:
``defect``, ``type``, and ``both`` of them as four classes.

Example:
    python tools/dataset_converters/elpv.py --out-dir data/elpv
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from converter_utils import ConverterError, logger, run_tool
from fetch_wheel_members import fetch_wheel_members

from lors_plugin.checkpoints.files import replace_file

REQUIREMENT = 'elpv-dataset==1.0.0.post1'
SHA256 = '85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c'
DATA = 'elpv_dataset/data'
NUM_PHOTOS = 2624
COUNTS = {
    (0, 'mono'): 588,
    (0, 'poly'): 920,
    (1, 'mono'): 313,
    (1, 'poly'): 402,
}
SIZES = dict(train=800, val=200)
TYPES = ('mono', 'poly')


class Cell(NamedTuple):
    """A photo with its labels: file name, 1 if defective, 'mono' or 'poly'."""

    name: str
    defect: int
    kind: str


def read_labels(path: Path) -> list[Cell]:
    """Read the cells whose label is certain.

    Each line of the package's ``labels.csv`` is a file, a probability and a
    type.
    """
    cells = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split()
        if len(words) != 3 or words[2] not in TYPES:
            raise ConverterError(f'{path}, line {number}: {line!r}')
        name, probability, kind = words
        if float(probability) in (0, 1):
            cells.append(Cell(Path(name).name, int(float(probability)), kind))
    return cells


def split_cells(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Divide the cells into ``train``, ``val`` and ``test``.

    All have the same shares of defects and types.
    """
    splits = dict(train=[], val=[], test=[])
    strata = {}
    for cell in sorted(cells):
        strata.setdefault((cell.defect, cell.kind), []).append(cell)
    done, before = 0, dict.fromkeys(SIZES, 0)
    for key in sorted(strata):
        stratum = strata[key]
        random.Random(f'elpv {key}').shuffle(stratum)
        done += len(stratum)
        start = 0
        for name, size in SIZES.items():
            # Rounded as a sum, so that the sizes come out exactly.
            until = round(size * done / len(cells))
            end = start + until - before[name]
            before[name] = until
            splits[name] += stratum[start:end]
            start = end
        splits['test'] += stratum[start:]
    return {name: sorted(part) for name, part in splits.items()}


def write_lists(splits: dict[str, list[Cell]], folder: Path) -> None:
    """Write a list of files and labels for each task and split."""
    for name, cells in splits.items():
        tasks = dict(
            defect=[cell.defect for cell in cells],
            type=[TYPES.index(cell.kind) for cell in cells],
        )
        pairs = zip(tasks['defect'], tasks['type'])
        tasks['both'] = [2 * defect + kind for defect, kind in pairs]
        for task, labels in tasks.items():
            lines = [f'{c.name} {label}\n' for c, label in zip(cells, labels)]
            with replace_file(folder / f'{task}_{name}.txt') as beside:
                beside.write_text(''.join(lines))
        logger.info(
            '%s: %d cells, %d defective, %d poly',
            name, len(cells), sum(tasks['defect']), sum(tasks['type']),
        )  # fmt: skip


def make_dataset(out_dir: Path, wheel_dir: Path) -> None:
    """Get the photos and write the lists."""
    names = [f'cell{i:04d}.png' for i in range(1, NUM_PHOTOS + 1)]
    fetch_wheel_members(
        REQUIREMENT, SHA256, [f'{DATA}/images/{name}' for name in names],
        out_dir / 'images', wheel_dir,
    )  # fmt: skip
    (labels,) = fetch_wheel_members(
        REQUIREMENT, SHA256, [f'{DATA}/labels.csv'], out_dir, wheel_dir
    )
    cells = read_labels(labels)
    if Counter((cell.defect, cell.kind) for cell in cells) != COUNTS:
        raise ConverterError(f'{labels} was changed: delete it, start again')
    write_lists(split_cells(cells), out_dir / 'annotations')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Make a classification set of solar cells (ELPV)'
    )
    parser.add_argument(
        '--out-dir', default='data/elpv', type=Path,
        help='root of the data set (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--wheel-dir', default='data/downloads', type=Path,
        help='folder that keeps the wheel (default: %(default)s)',
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    args = parse_args(argv)
    return run_tool(make_dataset, args.out_dir, args.wheel_dir)


if __name__ == '__main__':
    sys.exit(main())
