"""Convert Pascal VOC annotations (one xml an image) to COCO json.

Example:
    python tools/dataset_converters/voc_to_coco.py VOC2007/Annotations \
        VOC2007/JPEGImages annotations/train.json \
        --split VOC2007/ImageSets/Main/train.txt
    python tools/dataset_converters/voc_to_coco.py FOLDER FOLDER train.json \
        --val-fraction 0.2 --val-out val.json
"""

import argparse
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

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
    to_coco,
    visible_files,
    write_coco_files,
)


def list_xmls(xml_dir: str | Path, split: str | Path | None) -> list[Path]:
    """List the annotation files.

    Args:
        xml_dir (str or Path): Folder of the xml files; those in its folders
            count too.
        split (str or Path, optional): File with one name a line, as in
            ``ImageSets/Main``. Names whose second column is -1 (image
            without the class of the file) are left out.

    Returns:
        list[Path]: Paths, sorted or in the order of the split file.
    """
    xml_dir = Path(xml_dir)
    if split is None:
        paths = visible_files(xml_dir, ('.xml',))
    else:
        names = read_split(split, xml_dir)
        paths = [xml_dir / f'{name}.xml' for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ConverterError(
                f'{split} names {len(missing)} files that {xml_dir} does not '
                f'have, the first is {missing[0]}'
            )
    if not paths:
        raise ConverterError(f'no xml file found in {split or xml_dir}')
    return paths


def read_split(path: str | Path, xml_dir: Path) -> list[str]:
    """Read the names of a split.

    Args:
        path (str or Path): See :func:`list_xmls`. Image suffixes are left
            away, and names may hold spaces.
        xml_dir (Path): Folder of the xml files.

    Returns:
        list[str]: The names.
    """
    names = []
    for row in Path(path).read_text(encoding='utf-8-sig').splitlines():
        match = re.fullmatch(r'(.*\S)\s+(-1|0|1)', row.strip())
        name = row.strip()
        # A name may end in a number too, after a space.
        if match and not (xml_dir / f'{name}.xml').is_file():
            name = '' if match[2] == '-1' else match[1]
        if Path(name).suffix.lower() in (*IMG_SUFFIXES, '.xml'):
            name = str(Path(name).with_suffix(''))
        names.append(name)
    return [name for name in dict.fromkeys(names) if name]


def find_image(
    root: ElementTree.Element, xml: Path, folder: ImageFolder
) -> Path:
    """Find the image of an annotation file.

    The image of the same name as the xml file counts first, since the file
    name inside is often that of another machine; it decides where several
    images have the name, and where none has.

    Args:
        root (Element): Parsed xml.
        xml (Path): Path of the xml file.
        folder (ImageFolder): The images.

    Returns:
        Path: The image.
    """
    stated = (root.findtext('filename') or '').strip()
    named = PureWindowsPath(stated)  # splits at both kinds of slashes
    found = folder.find(xml.stem) or folder.find(named.stem)
    for fits in (
        lambda path: path.parent == xml.parent,
        lambda path: path.name == named.name,
    ):
        found = list(filter(fits, found)) or found
    if not found:
        raise ConverterError(
            f'image of {xml} is missing in {folder.root}: neither '
            f'{xml.stem}.* nor {stated or "a file name in the xml"}'
        )
    if len(found) > 1:
        raise ConverterError(
            f'{xml} fits several images: {", ".join(map(str, found))}'
        )
    return found[0]


def turn_corners(
    corners: Sequence[float], size: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Turn a box as the image loader turns a photo by a quarter.

    Args:
        corners (Sequence[float]): x1, y1, x2, y2 in the photo as stored.
        size (tuple[int, int]): Width and height as stored.
        orientation (int): EXIF orientation, from 5 to 8.

    Returns:
        tuple[float]: x1, y1, x2, y2 in the upright photo.
    """
    x1, y1, x2, y2 = corners
    across = (size[1] - y2, size[1] - y1) if orientation in (6, 7) else None
    down = (size[0] - x2, size[0] - x1) if orientation in (7, 8) else None
    (left, right), (top, bottom) = across or (y1, y2), down or (x1, x2)
    return left, top, right, bottom


def read_box(
    node: ElementTree.Element, xml: Path, zero_based: bool = False
) -> tuple[float, float, float, float]:
    """Read the corners of one box.

    Args:
        node (Element): The ``object`` element.
        xml (Path): Path of the xml file, for messages.
        zero_based (bool): False: corners are numbers of pixels that begin at
            1 and both belong to the box, as in Pascal VOC. True: corners are
            plain coordinates that begin at 0. Defaults to False.

    Returns:
        tuple[float]: x1, y1, x2, y2.
    """
    try:
        x1, y1, x2, y2 = (
            float(node.findtext(f'bndbox/{key}'))
            for key in ('xmin', 'ymin', 'xmax', 'ymax')
        )
    except (TypeError, ValueError) as error:
        raise ConverterError(f'{xml}: unreadable bndbox') from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ConverterError(f'{xml}: a bndbox is not finite')
    return (x1, y1, x2, y2) if zero_based else (x1 - 1, y1 - 1, x2, y2)


def read_voc(
    xmls: Sequence[Path],
    folder: ImageFolder,
    rename: Mapping[str, str] | None = None,
    zero_based: bool = False,
    difficult: str = 'ignore',
) -> list[LabelledImage]:
    """Read annotation files.

    Args:
        xmls (Sequence[Path]): The xml files.
        folder (ImageFolder): The images.
        rename (Mapping[str, str], optional): New names of classes. Defaults
            to None.
        zero_based (bool): See :func:`read_box`. Defaults to False.
        difficult (str): What becomes of boxes marked difficult: 'ignore'
            (``iscrowd=1``, neither hit nor miss), 'keep' or 'drop'. Defaults
            to 'ignore'.

    Returns:
        list[LabelledImage]: In the order of the files.
    """
    images, owners, counts = [], {}, Counter()
    for xml in xmls:
        try:
            root = ElementTree.parse(xml).getroot()
        except ElementTree.ParseError as error:
            raise ConverterError(f'{xml} is not xml: {error}') from error
        path = find_image(root, xml, folder)
        if path in owners:
            raise ConverterError(
                f'{owners[path]} and {xml} belong to the same image, {path}'
            )
        owners[path] = xml
        stored, orientation = read_orientation(path)
        turned = orientation >= 5
        size = stored[::-1] if turned else stored
        stated = [root.findtext(f'size/{k}') for k in ('width', 'height')]
        unturned = turned and stated == [str(v) for v in stored]
        counts['unturned'] += unturned
        if not unturned and stated != [str(v) for v in size]:
            counts['size'] += 1
        image = LabelledImage(path, size)
        for node in root.iter('object'):
            label = (node.findtext('name') or '').strip()
            corners = read_box(node, xml, zero_based)
            if unturned:
                corners = turn_corners(corners, stored, orientation)
            hard = (node.findtext('difficult') or '0').strip() == '1'
            if hard and difficult == 'drop':
                counts['difficult'] += 1
                continue
            crowd = hard and difficult == 'ignore'
            label = (rename or {}).get(label, label)
            image.boxes.append(LabelledBox(label, corners, crowd))
        images.append(image)
    for key, text in (
        ('size', '%d files state no or a wrong image size; the images count'),
        (
            'unturned',
            '%d photos lie on their side and so do their boxes; the boxes '
            'are turned as EXIF says',
        ),
        ('difficult', 'dropped %d difficult boxes'),
    ):
        if counts[key]:
            logger.warning(text, counts[key])
    return images


def choose_classes(
    images: Sequence[LabelledImage], classes: Sequence[str] | None
) -> list[str]:
    """Check the classes that are wanted, or take all that occur, sorted.

    Args:
        images (Sequence[LabelledImage]): The images.
        classes (Sequence[str], optional): What is wanted.

    Returns:
        list[str]: Class names.
    """
    found = {}
    for image in images:
        for box in image.boxes:
            found.setdefault(box.label, image.path)
    if classes is None:
        classes = sorted(found)
        if not classes:
            raise ConverterError(
                'there is no box in any file, so the classes are not known; '
                'name them with --classes'
            )
    check_classes(classes, '--classes')
    for label in sorted(set(found) - set(classes)):
        raise ConverterError(
            f'the boxes of {found[label]}: class {label!r} is not one of '
            f'{list(classes)}; add it to --classes or use --rename'
        )
    return list(classes)


def voc_to_coco(
    xmls: Sequence[Path],
    img_dir: str | Path,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> dict:
    """Convert annotation files.

    Args:
        xmls (Sequence[Path]): The xml files.
        img_dir (str or Path): Folder of the images.
        classes (Sequence[str], optional): Class names in their order.
            Defaults to None, which means all that occur, sorted.
        rename (Mapping[str, str], optional): New names of classes. Defaults
            to None.

    Returns:
        dict: Content of a COCO file.
    """
    images = read_voc(xmls, ImageFolder(img_dir), rename)
    return to_coco(images, Path(img_dir), choose_classes(images, classes))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Convert Pascal VOC xml files to COCO json'
    )
    parser.add_argument('xml_dir', help='folder of the xml files')
    parser.add_argument(
        'img_dir', help='folder of the images; may be the same'
    )
    parser.add_argument('out', help='json file to write')
    parser.add_argument(
        '--split', help='file with one name a line: convert these only'
    )
    add_output_arguments(parser)
    parser.add_argument(
        '--rename', nargs='+', default=[], metavar='OLD=NEW', help='classes'
    )
    parser.add_argument(
        '--zero-based',
        action='store_true',
        help='coordinates begin at 0 and xmax, ymax lie outside the box',
    )
    parser.add_argument(
        '--difficult',
        choices=('ignore', 'keep', 'drop'),
        default='ignore',
        help='boxes marked difficult (default: ignore, which makes them '
        'neither hit nor miss)',
    )
    args = parser.parse_args(argv)
    check_output_arguments(parser, args)
    if any(pair.count('=') != 1 for pair in args.rename):
        parser.error('--rename wants OLD=NEW')
    return args


def convert(args: argparse.Namespace) -> None:
    """Convert and write, as the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    folder = ImageFolder(args.img_dir)
    xmls = list_xmls(args.xml_dir, args.split)
    images = read_voc(
        xmls,
        folder,
        rename=dict(pair.split('=') for pair in args.rename),
        zero_based=args.zero_based,
        difficult=args.difficult,
    )
    left_out = len(folder.paths) - len(images)
    if left_out and args.split is None:
        logger.warning(
            '%d images of %s have no xml file and are left out',
            left_out,
            args.img_dir,
        )
    classes = choose_classes(images, args.classes)
    write_coco_files(images, folder.root, classes, args)


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
