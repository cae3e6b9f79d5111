"""Make the tree crown data set of the quick start.

Three aerial photos with hand-drawn crowns, from the MIT licensed wheel of
DeepForest. Two of them, cut into tiles, are for training, the third is for
validation.

Example:
    python tools/dataset_converters/tree_crowns.py --out-dir data/tree_crowns
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from converter_utils import (
    ConverterError,
    logger,
    read_coco,
    run_tool,
    write_json,
)
from fetch_wheel_members import fetch_wheel_members
from tile_coco import tile_coco
from voc_to_coco import voc_to_coco

REQUIREMENT = 'deepforest==2.1.0'
SHA256 = '8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54'
TRAIN_PHOTOS = ('2019_YELL_2_528000_4978000_image_crop2', 'OSBS_029')
VAL_PHOTOS = ('2019_YELL_2_541000_4977000_image_crop',)
TILE = 256
MIN_FRACTION = 0.4
# name: photos, overlap in pixels, drop empty tiles, tiles, boxes
SPLITS = {
    'train': (TRAIN_PHOTOS, 0, True, 83, 730),
    'train_overlap': (TRAIN_PHOTOS, 128, False, 327, 2407),
    'val': (VAL_PHOTOS, 0, False, 20, 296),
}


def is_complete(ann_file: Path, img_dir: Path) -> bool:
    """Tell whether a split was made; its COCO file is written last."""
    if not ann_file.is_file():
        return False
    try:
        images = read_coco(ann_file)['images']
    except ConverterError:
        return False
    return all((img_dir / info['file_name']).is_file() for info in images)


def make_split(out_dir: Path, name: str) -> None:
    """Cut the photos of one split of ``SPLITS`` and write its COCO file."""
    photos, overlap, drop_empty, tiles, boxes = SPLITS[name]
    img_dir = out_dir / 'photos'
    coco = voc_to_coco(
        [img_dir / f'{photo}.xml' for photo in photos],
        img_dir,
        classes=['tree'],
        rename={'Tree': 'tree'},
    )
    coco = tile_coco(
        coco,
        img_dir,
        out_dir / name,
        size=TILE,
        overlap=overlap,
        min_fraction=MIN_FRACTION,
        drop_empty=drop_empty,
    )
    counts = (len(coco['images']), len(coco['annotations']))
    if counts != (tiles, boxes):
        raise ConverterError(
            f'{name} has {counts[0]} tiles with {counts[1]} boxes instead of '
            f'{tiles} with {boxes}: was {img_dir} edited?'
        )
    write_json(coco, out_dir / 'annotations' / f'{name}.json')
    logger.info('%s: %d tiles, %d boxes', name, *counts)


def make_tree_crowns(
    out_dir: str | Path,
    wheel_dir: str | Path | None = None,
    force: bool = False,
) -> None:
    """Make the whole data set; reuse what is already there.

    Args:
        out_dir (str or Path): Root of the data set.
        wheel_dir (str or Path, optional): Folder that keeps the wheel.
            Defaults to None, which means ``downloads`` in ``out_dir``.
        force (bool): Whether to cut the photos again. Defaults to False.
    """
    out_dir = Path(out_dir)
    todo = [
        name
        for name in SPLITS
        if force
        or not is_complete(
            out_dir / 'annotations' / f'{name}.json', out_dir / name
        )
    ]
    if not todo:
        logger.info('%s is complete', out_dir)
        return
    fetch_wheel_members(
        REQUIREMENT,
        SHA256,
        [
            f'deepforest/data/{photo}{suffix}'
            for photo in TRAIN_PHOTOS + VAL_PHOTOS
            for suffix in ('.png', '.xml')
        ],
        out_dir / 'photos',
        wheel_dir or out_dir / 'downloads',
    )
    for name in todo:
        make_split(out_dir, name)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Make the tree crown data set of the quick start'
    )
    parser.add_argument('--out-dir', default='data/tree_crowns')
    parser.add_argument(
        '--wheel-dir', help='keeps the wheel (default: OUT_DIR/downloads)'
    )
    parser.add_argument(
        '--force', action='store_true', help='cut the photos again'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    args = parse_args(argv)
    return run_tool(make_tree_crowns, args.out_dir, args.wheel_dir, args.force)


if __name__ == '__main__':
    sys.exit(main())
