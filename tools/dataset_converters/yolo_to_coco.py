"""Convert YOLO labels (one txt an image) to COCO json.

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
from converter_utils import ConverterError, logger, run_tool
from labelled_images import (
    IMG_SUFFIXES,
    ImageFolder,
    LabelledBox,
    LabelledImage,
    add_output_arguments,
    check_classes,
    check_output_arguments,
    read_orientation,
    visible_files,
    write_coco_files,
)

NAME_FILES = ('data.yaml', 'data.yml', 'dataset.yaml', 'classes.txt')
NAME_FILES += ('obj.names', 'labels.txt')
# How far rounding may put a box beyond its image.
SLACK = 0.01


def find_names(label_dir: Path, img_dir: Path) -> Path:
    """Find the file that names the classes.

    Args:
        label_dir (Path): Folder of the labels.
        img_dir (Path): Folder of the images.

    Returns:
        Path: The first of ``NAME_FILES`` in these folders or the two above.
    """
    places = []
    for folder in (label_dir, img_dir):
        folder = folder.absolute()
        places += [folder, *folder.parents[:2]]
    for folder in dict.fromkeys(places):
        for name in NAME_FILES:
            if (folder / name).is_file():
                return folder / name
    raise ConverterError(
        f'no file with class names ({", ".join(NAME_FILES)}) in {label_dir} '
        'or above; give --names FILE or --classes NAME ...'
    )


def read_names(path: Path) -> list[str]:
    """Read class names in the order of their numbers.

    Args:
        path (Path): A yaml file with ``names``, a list or numbers and
            names, or a text file with one name a line.

    Returns:
        list[str]: The names.
    """
    text = path.read_text(encoding='utf-8-sig')
    if path.suffix.lower() not in ('.yaml', '.yml'):
        names = [row.strip() for row in text.rstrip().splitlines()]
    else:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConverterError(f'{path} is not yaml: {error}') from error
        names = content.get('names') if isinstance(content, dict) else None
        if isinstance(names, dict):
            numbers = {str(key): name for key, name in names.items()}
            wanted = [str(i) for i in range(len(names))]
            if set(numbers) != set(wanted):
                raise ConverterError(
                    f'{path}: the keys of `names` are not 0 to '
                    f'{len(names) - 1}'
                )
            names = [numbers[key] for key in wanted]
        if not isinstance(names, list):
            raise ConverterError(f'{path}: `names` is missing or no list')
        names = [str(name).strip() for name in names]
        if content.get('nc', len(names)) != len(names):
            raise ConverterError(
                f'{path}: nc={content["nc"]}, but `names` has {len(names)}'
            )
    check_classes(names, str(path))
    return names


def read_row(
    fields: Sequence[str],
    size: tuple[int, int],
    names: Sequence[str],
    polygons: bool = False,
) -> LabelledBox:
    """Read one row of a label file.

    Args:
        fields (Sequence[str]): What the row holds.
        size (tuple[int, int]): Width and height of the image.
        names (Sequence[str]): Class names.
        polygons (bool): Take the box around an outline, a row of x and y
            of three points at least. Defaults to False.

    Returns:
        LabelledBox: The box in pixels.
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
    """Read one label file.

    Args:
        path (Path): The file.
        size, names, polygons: See :func:`read_row`.

    Returns:
        list[LabelledBox]: The boxes; rows that occur twice count once.
    """
    boxes, seen = [], set()
    try:
        rows = path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ConverterError(f'{path} is not text: {error}') from error
    for number, row in enumerate(rows, start=1):
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
    """List the images of a split.

    Args:
        folder (ImageFolder): All images.
        split (str or Path, optional): File with one image a line, a path or
            a name, with or without suffix. Defaults to None, which means
            all.

    Returns:
        list[Path]: The images.
    """
    if split is None:
        return folder.paths
    chosen = []
    for row in Path(split).read_text(encoding='utf-8-sig').splitlines():
        if not row.strip():
            continue
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
    label_dir: str | Path,
    folder: ImageFolder,
    names: Sequence[str],
    split: str | Path | None = None,
    polygons: bool = False,
) -> list[LabelledImage]:
    """Read all labels.

    Args:
        label_dir (str or Path): Folder of the label files, in the same
            folders as the images or all in one.
        folder (ImageFolder): The images.
        names (Sequence[str]): Class names.
        split (str or Path, optional): See :func:`choose_images`.
        polygons (bool): See :func:`read_row`. Defaults to False.

    Returns:
        list[LabelledImage]: The images, with and without boxes.
    """
    label_dir = Path(label_dir)
    paths = choose_images(folder, split)
    stems = Counter(path.stem for path in paths)
    images, used, turned = [], set(), 0
    for path in paths:
        (width, height), orientation = read_orientation(path)
        turned += orientation >= 5
        size = (height, width) if orientation >= 5 else (width, height)
        image = LabelledImage(path, size)
        nested = path.relative_to(folder.root).with_suffix('.txt')
        label = label_dir / nested
        if not label.is_file() and stems[path.stem] == 1:
            label = label_dir / nested.name
        if label in used:
            raise ConverterError(f'{label} belongs to {path} and to another')
        if label.is_file():
            used.add(label)
            image.boxes = read_labels(label, size, names, polygons)
        images.append(image)
    if not used:
        raise ConverterError(
            f'none of {len(images)} images of {folder.root} has a label file '
            f'in {label_dir}'
        )
    if turned:
        logger.warning(
            '%d photos are turned by EXIF; their boxes are taken for those '
            'of the upright photo',
            turned,
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
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Convert YOLO label files to COCO json'
    )
    parser.add_argument('label_dir', help='folder of the txt files')
    parser.add_argument(
        'img_dir', help='folder of the images; may be the same'
    )
    parser.add_argument('out', help='json file to write')
    parser.add_argument(
        '--names',
        help='file of the class names, data.yaml or one a line (default: '
        f'{", ".join(NAME_FILES)} near the labels)',
    )
    parser.add_argument(
        '--split', help='file with one image a line: convert these only'
    )
    parser.add_argument(
        '--polygons',
        action='store_true',
        help='labels may be outlines; take the box around each',
    )
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    check_output_arguments(parser, args)
    if args.classes and args.names:
        parser.error('give either --classes or --names')
    return args


def convert(args: argparse.Namespace) -> None:
    """Convert and write, as the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    folder = ImageFolder(args.img_dir)
    if not Path(args.label_dir).is_dir():
        raise ConverterError(
            f'the label folder {args.label_dir} does not exist'
        )
    if args.classes:
        check_classes(args.classes, '--classes')
        names = args.classes
    else:
        path = args.names or find_names(Path(args.label_dir), folder.root)
        names = read_names(Path(path))
        logger.info('class names of %s', path)
    images = read_yolo(
        args.label_dir, folder, names, args.split, args.polygons
    )
    write_coco_files(images, folder.root, names, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    return run_tool(lambda: convert(args))


if __name__ == '__main__':
    sys.exit(main())
