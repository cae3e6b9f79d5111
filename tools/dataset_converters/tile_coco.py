"""Cut the large images of a COCO data set into tiles.

Example:
    python tools/dataset_converters/tile_coco.py photos.json photos \
        annotations/train.json train --size 256 --overlap 128
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from converter_utils import (
    ConverterError,
    load_image,
    logger,
    read_coco,
    run_tool,
    write_json,
)

from lors_plugin.checkpoints.files import replace_file

Tile = tuple[int, int, int, int]


def tile_starts(
    length: int, size: int, overlap: int = 0, min_strip: int = 32
) -> list[int]:
    """Return the first pixels of tiles along one side of an image.

    The last tile is moved inwards to end at the border, so that all tiles
    have one size, unless it would show fewer than ``min_strip`` new pixels.
    """
    if not 0 <= overlap < size:
        raise ConverterError(
            f'overlap must be in [0, size), got {overlap} for size {size}'
        )
    starts = list(range(0, max(length - size, 0) + 1, size - overlap))
    if length - (starts[-1] + size) >= max(min_strip, 1):
        starts.append(length - size)
    return starts


def clip_box(box: Sequence[float], tile: Tile) -> list[float] | None:
    """Clip a COCO box to a tile, None when nothing is inside."""
    x1, y1 = max(box[0], tile[0]), max(box[1], tile[1])
    x2 = min(box[0] + box[2], tile[2])
    y2 = min(box[1] + box[3], tile[3])
    if x2 <= x1 or y2 <= y1:
        return None
    return [x1 - tile[0], y1 - tile[1], x2 - x1, y2 - y1]


def tile_annotations(
    annotations: Sequence[dict], tile: Tile, min_fraction: float = 0.5
) -> dict[int, dict]:
    """Select and clip the annotations of one tile.

    A box stays when at least ``min_fraction`` of its area is inside; crowd
    regions always stay. Returns what is kept by its index in
    ``annotations``, without ``id`` and ``image_id``.
    """
    kept = {}
    for index, annotation in enumerate(annotations):
        box = clip_box(annotation['bbox'], tile)
        if box is None:
            continue
        crowd = annotation.get('iscrowd', 0)
        _, _, width, height = annotation['bbox']
        if not crowd and box[2] * box[3] < min_fraction * width * height:
            continue
        kept[index] = dict(
            category_id=annotation['category_id'],
            bbox=box,
            area=box[2] * box[3],
            iscrowd=crowd,
        )
    return kept


def load_checked(info: dict, img_dir: str | Path) -> np.ndarray:
    """Load an image as the training does; its size is the annotated one."""
    path = Path(img_dir) / info['file_name']
    if not path.is_file():
        raise ConverterError(f'image {path} is missing')
    image = load_image(path)
    for name, length in zip(('height', 'width'), image.shape):
        stated = info.get(name, length)
        try:
            right = float(stated) == length
        except (TypeError, ValueError):
            right = False
        if not right:
            height, width = image.shape[:2]
            raise ConverterError(
                f'{path} is {width}x{height}, and its annotation has the '
                f'{name} {stated!r}'
            )
    return image


def tile_stems(images: Sequence[dict]) -> list[str]:
    """Choose the beginnings of the tiles' names, all different.

    They are the images' names without suffix and in one word, with a number
    where another image has the same.
    """
    stems: dict[str, str] = {}
    for info in images:
        stem = Path(info['file_name']).with_suffix('').as_posix()
        stem = name = stem.replace('/', '_')
        # Some file systems take upper and lower case for the same.
        for number in itertools.count(2):
            if name.casefold() not in stems:
                break
            name = f'{stem}-{number}'
        stems[name.casefold()] = name
    return list(stems.values())


def tile_coco(
    coco: dict,
    img_dir: str | Path,
    out_dir: str | Path,
    size: int = 256,
    overlap: int = 0,
    min_fraction: float = 0.5,
    min_strip: int = 32,
    drop_empty: bool = False,
) -> dict:
    """Cut all images of a COCO data set and write the tiles as PNG files.

    Masks and key points are not carried over.

    Args:
        coco (dict): Content of the COCO file, see :func:`read_coco`.
        img_dir (str or Path): Folder of the images.
        out_dir (str or Path): Folder for the tiles.
        size (int): Width and height of a tile. Images that are smaller stay
            as they are. Defaults to 256.
        overlap (int): Pixels that neighbours share. Defaults to 0.
        min_fraction (float): See :func:`tile_annotations`. Defaults to 0.5.
        min_strip (int): See :func:`tile_starts`. Defaults to 32.
        drop_empty (bool): Whether to leave out tiles without boxes. Defaults
            to False.

    Returns:
        dict: Content of the COCO file of the tiles.
    """
    by_image: dict[object, list[dict]] = {}
    for annotation in coco['annotations']:
        by_image.setdefault(annotation['image_id'], []).append(annotation)
    images, annotations, lost = [], [], 0
    for info, stem in zip(coco['images'], tile_stems(coco['images'])):
        image = load_checked(info, img_dir)
        height, width = image.shape[:2]
        own, found = by_image.get(info['id'], []), set()
        for top in tile_starts(height, size, overlap, min_strip):
            for left in tile_starts(width, size, overlap, min_strip):
                right, bottom = left + size, top + size
                tile = (left, top, min(right, width), min(bottom, height))
                kept = tile_annotations(own, tile, min_fraction)
                found.update(kept)
                if drop_empty and not kept:
                    continue
                name = f'{stem}_{top:05d}_{left:05d}.png'
                write_tile(image, tile, Path(out_dir) / name)
                images.append(
                    dict(
                        id=len(images) + 1,
                        file_name=name,
                        width=tile[2] - left,
                        height=tile[3] - top,
                    )
                )
                for annotation in kept.values():
                    annotation.update(
                        id=len(annotations) + 1, image_id=len(images)
                    )
                    annotations.append(annotation)
        lost += len(own) - len(found)
    if lost:
        logger.warning(
            '%d of %d boxes are in no tile: without area, outside of their '
            'image, or less than %g of them in any tile',
            lost,
            len(coco['annotations']),
            min_fraction,
        )
    return dict(
        images=images,
        annotations=annotations,
        categories=coco['categories'],
    )


def write_tile(image: np.ndarray, tile: Tile, path: Path) -> None:
    """Write a part of a BGR image as a PNG file."""
    left, top, right, bottom = tile
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    _, data = cv2.imencode('.png', image[top:bottom, left:right], options)
    with replace_file(path) as beside:
        beside.write_bytes(data.tobytes())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Cut the large images of a COCO data set into tiles'
    )
    parser.add_argument('ann_file', help='COCO json file')
    parser.add_argument('img_dir', help='folder of the images')
    parser.add_argument('out_file', help='json file to write')
    parser.add_argument('out_dir', help='folder for the tiles')
    parser.add_argument('--size', type=int, default=256, help='of a tile')
    parser.add_argument(
        '--overlap', type=int, default=0, help='pixels that neighbours share'
    )
    parser.add_argument(
        '--min-fraction',
        type=float,
        default=0.5,
        help='part of the area of a box that must be inside the tile',
    )
    parser.add_argument(
        '--min-strip',
        type=int,
        default=32,
        help='smallest rest at the border, in pixels, that gets a tile',
    )
    parser.add_argument(
        '--drop-empty', action='store_true', help='no tiles without boxes'
    )
    args = parser.parse_args(argv)
    if args.size < 1 or not 0 <= args.min_fraction <= 1:
        parser.error('--size wants a positive, --min-fraction one in [0, 1]')
    return args


def convert(args: argparse.Namespace) -> None:
    """Cut and write, as the command line says."""
    coco = tile_coco(
        read_coco(args.ann_file),
        args.img_dir,
        args.out_dir,
        args.size,
        args.overlap,
        args.min_fraction,
        args.min_strip,
        args.drop_empty,
    )
    write_json(coco, args.out_file)
    logger.info(
        '%s: %d tiles, %d boxes',
        args.out_file,
        len(coco['images']),
        len(coco['annotations']),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(convert, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
