"""Helpers of the data set converters.

Files of other programs are read here in whatever encoding they have, images
are measured as the image loader will show them, and COCO files are written. A
converter reads its format into a list of :class:`LabelledImage`;
:func:`write_coco_files` does the rest.
"""

import argparse
import json
import logging
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lors_plugin.checkpoints.files import replace_file

logger = logging.getLogger('dataset_converters')
# Maps and scans are larger than what Pillow takes for an attack.
Image.MAX_IMAGE_PIXELS = None

IMG_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
EXIF_ORIENTATION = 0x0112
BYTE_ORDER_MARKS = {
    b'\xef\xbb\xbf': 'utf-8-sig',
    b'\xff\xfe': 'utf-16',
    b'\xfe\xff': 'utf-16',
}


class ConverterError(RuntimeError):
    """A mistake in the input that the user can repair."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno <= logging.INFO:
            return text
        return f'{record.levelname.lower()}: {text}'


def run_tool(work: Callable[..., None], *args: object) -> int:
    """Run a tool; its errors become a message and the exit code 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        work(*args)
    except (ConverterError, OSError) as error:
        logger.error('%s', error)
        return 1
    return 0


# Reading and writing


def read_text(path: str | Path, encoding: str = 'utf-8') -> str:
    """Read a text file; a byte order mark decides about its encoding."""
    data = Path(path).read_bytes()
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            encoding = name
    try:
        text = data.decode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ConverterError(
            f'{path} is not text in the encoding {encoding} ({error}); save '
            'it as UTF-8'
        ) from error
    if '\0' in text:
        raise ConverterError(
            f'{path} is not text in the encoding {encoding} but perhaps in '
            'UTF-16; save it as UTF-8'
        )
    return text


def write_json(content: dict, path: str | Path) -> None:
    """Write ``content`` as JSON, completely or not at all."""
    with replace_file(path) as beside:
        beside.write_text(json.dumps(content), encoding='utf-8')


def read_coco(path: str | Path) -> dict:
    """Read a COCO annotation file and check what the converters rely on.

    Images have names and ids of their own, annotations belong to an image and
    a category and have boxes of four finite numbers; else an error names file
    and entry.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ConverterError(f'{path} does not exist') from error
    except (ValueError, RecursionError) as error:
        raise ConverterError(f'{path} is not JSON: {error}') from error
    keys = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list)
        and all(isinstance(item, dict) for item in content[key])
        for key in keys
    ):
        raise ConverterError(f'{path} is not a COCO file: it needs {keys}')
    ids: set = set()
    found = (category.get('id') for category in content['categories'])
    categories = {value for value in found if _is_id(value)}
    for number, info in enumerate(content['images']):
        where = f'{path}: images[{number}]'
        name = info.get('file_name')
        if not isinstance(name, str) or not name:
            raise ConverterError(f'{where} has the file_name {name!r}')
        image_id = info.get('id')
        if not _is_id(image_id) or image_id in ids:
            raise ConverterError(
                f'{where}, {name}: its id {image_id!r} is no id or that of '
                'another image'
            )
        ids.add(image_id)
    for number, annotation in enumerate(content['annotations']):
        where = f'{path}: annotations[{number}]'
        for key, known in (('image_id', ids), ('category_id', categories)):
            value = annotation.get(key)
            if not _is_id(value) or value not in known:
                raise ConverterError(
                    f'{where}: its {key} is {value!r}, which is the id of no '
                    f'{key.removesuffix("_id")}'
                )
        if not _is_box(annotation.get('bbox')):
            raise ConverterError(
                f'{where}: its bbox {annotation.get("bbox")!r} is not x, y, '
                'width and height'
            )
    return content


def _is_id(value: object) -> bool:
    return isinstance(value, int | float | str)


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, int | float) for v in value)
        and all(map(math.isfinite, value))
    )


# Images


def load_image(path: str | Path) -> np.ndarray:
    """Load an image as MMCV does by default.

    Returns BGR values of 8 bits, turned as OpenCV turns that format by EXIF,
    of shape (H, W, 3).
    """
    reason = 'damaged, or values of 32 bits'
    try:
        data = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except cv2.error as error:
        pixels, reason = None, error.err
    if pixels is None:
        raise ConverterError(
            f'the image loader (OpenCV) cannot read {path}: {reason}'
        )
    return pixels


@dataclass
class ImageSize:
    """The size of an image, without and with the effect of EXIF.

    Attributes:
        stored (tuple[int, int]): Width and height in the file.
        loaded (tuple[int, int]): Width and height as the loader shows it.
        orientation (int): EXIF orientation, 1 where it means nothing. Some
            formats are loaded without regard to it.
    """

    stored: tuple[int, int]
    loaded: tuple[int, int]
    orientation: int = 1


def read_size(path: str | Path) -> ImageSize:
    """Read the size of an image.

    Pixels are decoded only where EXIF says something about them: whether the
    loader follows it depends on the format and the release of OpenCV.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            # That of PNG files would decode the pixels to look behind them.
            exif = Image.Image.getexif(image)
            orientation = exif.get(EXIF_ORIENTATION, 1)
            if image.format == 'TIFF':  # `size` follows EXIF here only
                stored = (image.tag_v2[256], image.tag_v2[257])
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise ConverterError(f'cannot read image {path}: {error}') from error
    if orientation not in range(2, 9):
        return ImageSize(stored, stored)
    height, width = load_image(path).shape[:2]
    return ImageSize(stored, (width, height), orientation)


def visible_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List files below a folder by their suffixes in lower case, sorted.

    Names that begin with a dot are left out; some archives hold such a file
    beside every real one.
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

    An accent is one character or two, depending on the system that wrote the
    file name; both are the same name here.
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
            self._by_stem.setdefault(_normal(path.stem), []).append(path)

    def find(self, stem: str) -> list[Path]:
        """Return all images of a name without suffix."""
        return self._by_stem.get(_normal(stem), [])


def _normal(text: str) -> str:
    return unicodedata.normalize('NFC', text)


# From labelled images to COCO files


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


@dataclass
class LabelledImage:
    """One image with its boxes, none for background.

    Attributes:
        path (Path): The image.
        size (tuple[int, int]): Width and height as the loader shows it.
        boxes (list[LabelledBox]): Its boxes.
    """

    path: Path
    size: tuple[int, int]
    boxes: list[LabelledBox] = field(default_factory=list)


def check_classes(classes: Sequence[str], origin: object) -> None:
    """Refuse names that are empty or not unique."""
    wrong = [c for c, n in Counter(classes).items() if n > 1 or not c.strip()]
    if wrong or not classes:
        raise ConverterError(
            f'{origin}: class names must be there, unique and not empty; '
            f'{wrong or list(classes)} is wrong'
        )


def to_coco(
    images: Sequence[LabelledImage], root: Path, classes: Sequence[str]
) -> dict:
    """Make the content of a COCO file, with file names relative to ``root``.

    Boxes are clipped to their image; those without area are left out.
    """
    ids = {label: i for i, label in enumerate(classes, start=1)}
    infos, annotations, dropped = [], [], 0
    for image_id, image in enumerate(images, start=1):
        name = image.path.relative_to(root).as_posix()
        width, height = image.size
        infos.append(
            dict(id=image_id, file_name=name, width=width, height=height)
        )
        for box in image.boxes:
            x1, x2 = (min(max(x, 0), width) for x in box.corners[::2])
            y1, y2 = (min(max(y, 0), height) for y in box.corners[1::2])
            if x2 <= x1 or y2 <= y1:
                dropped += 1
                continue
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=ids[box.label],
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(box.crowd),
                )
            )
    if dropped:
        logger.warning('dropped %d boxes without area', dropped)
    categories = [dict(id=i, name=label) for label, i in ids.items()]
    return dict(images=infos, annotations=annotations, categories=categories)


def split_images(
    images: Sequence[LabelledImage], fraction: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Draw a fraction of the images for validation.

    The same images and seed give the same split, in any order of reading.
    Returns images for training and for validation.
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


def make_parser(description: str, labels: str) -> argparse.ArgumentParser:
    """Make a parser with the options that the converters have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(labels, help='folder of the labels')
    parser.add_argument(
        'img_dir', help='folder of the images; may be the same'
    )
    parser.add_argument('out', help='json file to write')
    parser.add_argument('--split', help='file: convert only what it lists')
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
    return parser


def parse_output(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse, and refuse options of :func:`make_parser` that do not fit."""
    args = parser.parse_args(argv)
    if (args.val_fraction is None) != (args.val_out is None):
        parser.error('--val-fraction and --val-out go together')
    if args.val_out is not None and Path(args.val_out) == Path(args.out):
        parser.error('--val-out and OUT are the same file')
    return args


def write_coco_files(
    images: Sequence[LabelledImage],
    root: Path,
    classes: Sequence[str],
    args: argparse.Namespace,
) -> None:
    """Write the files that the options ask for, and say what they hold."""
    parts = {args.out: images}
    if args.val_out is not None:
        train, val = split_images(images, args.val_fraction, args.seed)
        parts = {args.out: train, args.val_out: val}
    contents = {
        out: to_coco(part, root, classes) for out, part in parts.items()
    }
    for out, coco in contents.items():
        write_json(coco, out)
        counts = Counter(
            classes[a['category_id'] - 1] for a in coco['annotations']
        )
        filled = {a['image_id'] for a in coco['annotations']}
        logger.info(
            '%s: %d images (%d without boxes), %d boxes: %s',
            out,
            len(coco['images']),
            len(coco['images']) - len(filled),
            len(coco['annotations']),
            ', '.join(f'{name!r} {counts[name]}' for name in classes),
        )
        absent = [name for name in classes if not counts[name]]
        if absent:
            logger.warning('%s: no box of %s', out, absent)
