"""From labelled images to COCO files, whatever the labels were written in.

A converter reads its format into a list of :class:`LabelledImage` and adds
:func:`add_output_arguments` to its options; :func:`write_coco_files` does the
rest: numbers, the split into training and validation, the files, a summary.
"""

import argparse
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converter_utils import ConverterError, logger, write_json
from PIL import Image

IMG_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
EXIF_ORIENTATION = 0x0112


@dataclass
class LabelledBox:
    """One box of an image.

    Attributes:
        label (str): Class name.
        corners (tuple[float]): x1, y1, x2 and y2 in pixels of the image.
        crowd (bool): Whether it counts neither as hit nor as miss.
    """

    label: str
    corners: tuple[float, float, float, float]
    crowd: bool = False

    def clipped(self, size: tuple[int, int]) -> list[float]:
        """Return the part inside an image as a COCO box.

        Args:
            size (tuple[int, int]): Width and height of the image.

        Returns:
            list[float]: x, y, width and height.
        """
        x1, x2 = (min(max(self.corners[i], 0), size[0]) for i in (0, 2))
        y1, y2 = (min(max(self.corners[i], 0), size[1]) for i in (1, 3))
        return [x1, y1, x2 - x1, y2 - y1]


@dataclass
class LabelledImage:
    """One image with its boxes.

    Attributes:
        path (Path): The image.
        size (tuple[int, int]): Width and height as an image loader sees
            them, after the EXIF orientation.
        boxes (list[LabelledBox]): None for an image of background.
    """

    path: Path
    size: tuple[int, int]
    boxes: list[LabelledBox] = field(default_factory=list)


def visible_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List files below a folder.

    Args:
        folder (Path): The folder.
        suffixes (Sequence[str]): In lower case; the files may have others.

    Returns:
        list[Path]: Sorted, without those whose name begins with a dot,
        which some archives hold beside every real file.
    """
    return sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not path.name.startswith('.')
    )


class ImageFolder:
    """All images below a folder, found by name.

    Names are compared as people see them: an accent is one character or
    two, depending on the system that wrote the file name.

    Args:
        root (str or Path): The folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ConverterError(f'the image folder {root} does not exist')
        self.paths = visible_files(self.root, IMG_SUFFIXES)
        if not self.paths:
            raise ConverterError(
                f'no image found in {root}; looked for {IMG_SUFFIXES}'
            )
        self._by_stem: dict[str, list[Path]] = {}
        for path in self.paths:
            self._by_stem.setdefault(_plain(path.stem), []).append(path)

    def find(self, stem: str) -> list[Path]:
        """Return all images of a name without suffix."""
        return self._by_stem.get(_plain(stem), [])


def _plain(text: str) -> str:
    """One spelling of a name, whatever system wrote it."""
    return unicodedata.normalize('NFC', text)


def read_orientation(path: Path) -> tuple[tuple[int, int], int]:
    """Read the size of an image as it is stored, and how it is to be turned.

    Args:
        path (Path): The image.

    Returns:
        tuple: Width and height in the file, and the EXIF orientation, 1 for
        an upright image.
    """
    try:
        with Image.open(path) as image:
            return image.size, image.getexif().get(EXIF_ORIENTATION, 1)
    except OSError as error:
        raise ConverterError(f'cannot read image {path}: {error}') from error


def read_size(path: Path) -> tuple[int, int]:
    """Read the size of an image as the image loader will see it.

    Args:
        path (Path): The image.

    Returns:
        tuple[int, int]: Width and height, after the EXIF orientation.
    """
    (width, height), orientation = read_orientation(path)
    return (height, width) if orientation >= 5 else (width, height)


def split_images(
    images: Sequence[LabelledImage], fraction: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Draw images for validation.

    The same images and seed give the same split, in any order of reading.

    Args:
        images (Sequence[LabelledImage]): All images.
        fraction (float): Share of the images to draw, between 0 and 1.
        seed (int): Of the draw.

    Returns:
        tuple: Images for training and for validation.
    """
    images = sorted(images, key=lambda image: image.path)
    number = round(len(images) * fraction)
    if not 0 < number < len(images):
        raise ConverterError(
            f'--val-fraction {fraction} of {len(images)} images leaves '
            f'{len(images) - number} for training and {number} for validation'
        )
    drawn = set(random.Random(seed).sample(range(len(images)), number))
    train = [image for i, image in enumerate(images) if i not in drawn]
    return train, [images[i] for i in sorted(drawn)]


def to_coco(
    images: Sequence[LabelledImage], root: Path, classes: Sequence[str]
) -> dict:
    """Make the content of a COCO file.

    Boxes are clipped to their image; what has no area is left out.

    Args:
        images (Sequence[LabelledImage]): The images.
        root (Path): Folder that file names are relative to.
        classes (Sequence[str]): Class names in their order.

    Returns:
        dict: The content.
    """
    numbers = {label: i for i, label in enumerate(classes, start=1)}
    infos, annotations, dropped = [], [], 0
    for image_id, image in enumerate(images, start=1):
        name = image.path.relative_to(root).as_posix()
        width, height = image.size
        infos.append(
            dict(id=image_id, file_name=name, width=width, height=height)
        )
        for box in image.boxes:
            xywh = box.clipped(image.size)
            if min(xywh[2:]) <= 0:
                dropped += 1
                continue
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=numbers[box.label],
                    bbox=xywh,
                    area=xywh[2] * xywh[3],
                    iscrowd=int(box.crowd),
                )
            )
    if dropped:
        logger.warning('dropped %d boxes without area', dropped)
    categories = [dict(id=i, name=label) for label, i in numbers.items()]
    return dict(images=infos, annotations=annotations, categories=categories)


def check_classes(classes: Sequence[str], origin: str) -> None:
    """Refuse names that are empty or not unique.

    Args:
        classes (Sequence[str]): Class names.
        origin (str): Where they come from, for messages.
    """
    wrong = [c for c, n in Counter(classes).items() if n > 1 or not c.strip()]
    if wrong or not classes:
        raise ConverterError(
            f'{origin}: class names must be there, unique and not empty; '
            f'{wrong or list(classes)} is wrong'
        )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all converters share.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument('--classes', nargs='+', help='class names, in order')
    parser.add_argument(
        '--val-fraction',
        type=float,
        metavar='SHARE',
        help='draw this share of the images for validation (0.2: one in '
        'five); they go to --val-out and not to OUT',
    )
    parser.add_argument('--val-out', help='json file of the drawn images')
    parser.add_argument(
        '--seed', type=int, default=0, help='of the draw (default: 0)'
    )


def check_output_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> None:
    """Refuse options that make no sense together.

    Args:
        parser (argparse.ArgumentParser): For the message.
        args (argparse.Namespace): The options.
    """
    if (args.val_fraction is None) != (args.val_out is None):
        parser.error('--val-fraction and --val-out go together')
    if args.val_out is not None and Path(args.val_out) == Path(args.out):
        parser.error('--val-out and OUT are the same file')


def write_coco_files(
    images: Sequence[LabelledImage],
    root: Path,
    classes: Sequence[str],
    args: argparse.Namespace,
) -> None:
    """Write what :func:`add_output_arguments` asks for, and a summary.

    Args:
        images (Sequence[LabelledImage]): All images.
        root (Path): Folder that file names are relative to.
        classes (Sequence[str]): Class names in their order.
        args (argparse.Namespace): The options.
    """
    parts = {args.out: list(images)}
    if args.val_out is not None:
        train, val = split_images(images, args.val_fraction, args.seed)
        parts = {args.out: train, args.val_out: val}
    contents = {
        out: to_coco(part, root, classes) for out, part in parts.items()
    }
    for out, coco in contents.items():
        write_json(coco, out)
        report(coco, out)


def report(coco: dict, out: str | Path) -> None:
    """Say what a file holds, so that mistakes are seen before a training.

    Args:
        coco (dict): The content.
        out (str or Path): Path of the file.
    """
    names = {c['id']: c['name'] for c in coco['categories']}
    counts = Counter(names[a['category_id']] for a in coco['annotations'])
    filled = len({a['image_id'] for a in coco['annotations']})
    logger.info(
        '%s: %d images (%d without boxes), %d boxes: %s',
        out,
        len(coco['images']),
        len(coco['images']) - filled,
        len(coco['annotations']),
        ', '.join(f'{name!r} {counts[name]}' for name in names.values()),
    )
    absent = [name for name in names.values() if not counts[name]]
    if absent:
        logger.warning('%s: no box of %s', out, absent)
