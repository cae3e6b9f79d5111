"""Convert Pascal VOC annotations (one xml per image) to COCO json.

Example:
    python tools/dataset_converters/voc_to_coco.py VOC2007/Annotations \
        VOC2007/JPEGImages annotations/train.json \
        --split VOC2007/ImageSets/Main/train.txt
    python tools/dataset_converters/voc_to_coco.py FOLDER FOLDER train.json \
        --val-fraction 0.2 --val-out val.json
"""

import argparse
import codecs
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

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
    to_coco,
    visible_files,
    write_coco_files,
)

# Programs write the larger set of characters under the name of the smaller.
SUPERSETS = {
    'gb2312': 'gb18030',
    'gbk': 'gb18030',
    'shift_jis': 'cp932',
    'euc_kr': 'cp949',
}
NOTES = dict(
    size='%d files state no or a wrong image size; the images count',
    lying='%d photos lie on their side and so do their boxes; the boxes are '
    'turned as EXIF says',
    unclear='%d photos are turned or mirrored by EXIF, and the size in the '
    'xml does not tell whether their boxes are; the boxes are taken for those '
    'of the photo as the image loader shows it',
    difficult='dropped %d difficult boxes',
)


def list_xmls(xml_dir: str | Path, split: str | Path | None) -> list[Path]:
    """List the annotation files, sorted or in the order of a split file.

    A split has one name per line, as in ``ImageSets/Main``. Names whose second
    column is -1 (image without the class of the file) are left out.
    """
    xml_dir = Path(xml_dir)
    if split is None:
        paths = visible_files(xml_dir, ('.xml',))
    else:
        paths = [
            xml_dir / f'{name}.xml' for name in read_split(split, xml_dir)
        ]
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
    """Read the names of a split, see :func:`list_xmls`.

    Suffixes of images are removed; names may hold spaces.
    """
    names = []
    for row in read_text(path).splitlines():
        name = row.strip()
        match = re.fullmatch(r'(.*\S)\s+(-1|0|1)', name)
        # A name may end in a number too, after a space.
        if match and not (xml_dir / f'{name}.xml').is_file():
            name = '' if match[2] == '-1' else match[1]
        if Path(name).suffix.lower() in (*IMG_SUFFIXES, '.xml'):
            name = str(Path(name).with_suffix(''))
        names.append(name)
    return [name for name in dict.fromkeys(names) if name]


def read_xml(path: Path) -> ElementTree.Element:
    """Parse an xml file in any encoding that Python knows, unlike Expat."""
    start = path.read_bytes()[:200]
    stated = re.match(rb'<\?xml[^>]*?\sencoding\s*=\s*["\']([\w.-]+)', start)
    encoding = stated[1].decode() if stated else 'utf-8'
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError as error:
        raise ConverterError(f'{path}: {error}') from error
    text = read_text(path, SUPERSETS.get(encoding, encoding))
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ConverterError(f'{path} is not xml: {error}') from error


def find_image(
    root: ElementTree.Element, xml: Path, folder: ImageFolder
) -> Path:
    """Find the image of an annotation file.

    The image of the same name as the xml file comes first, since the file name
    inside is often that of another machine; the latter decides where several
    images have the name of the xml file, or none.
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

    ``corners`` and ``size`` are those of the photo as it is stored, and the
    EXIF ``orientation`` is one of 5 to 8.
    """
    (x1, y1, x2, y2), (width, height) = corners, size
    left, right = (
        (height - y2, height - y1) if orientation in (6, 7) else (y1, y2)
    )
    top, bottom = (
        (width - x2, width - x1) if orientation in (7, 8) else (x1, x2)
    )
    return left, top, right, bottom


def read_box(
    node: ElementTree.Element, xml: Path, zero_based: bool = False
) -> tuple[float, float, float, float]:
    """Read x1, y1, x2, y2 of an ``object`` element.

    In Pascal VOC corners are indices of pixels that begin at 1, and both
    belong to the box; with ``zero_based`` they are coordinates from 0.
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


def stated_size(root: ElementTree.Element) -> tuple[float, float] | None:
    """Read the image size in an xml, None if it is not there."""
    try:
        width, height = (
            float(root.findtext(f'size/{key}')) for key in ('width', 'height')
        )
    except (TypeError, ValueError):
        return None
    return width, height


def read_voc(
    xmls: Sequence[Path],
    folder: ImageFolder,
    rename: Mapping[str, str] | None = None,
    zero_based: bool = False,
    difficult: str = 'ignore',
) -> list[LabelledImage]:
    """Read annotation files.

    Boxes marked difficult are read as crowd (``difficult='ignore'``: neither
    hit nor miss), as others ('keep') or not at all ('drop').
    """
    images, owners, counts = [], {}, Counter()
    for xml in xmls:
        root = read_xml(xml)
        path = find_image(root, xml, folder)
        if path in owners:
            raise ConverterError(
                f'{owners[path]} and {xml} belong to the same image, {path}'
            )
        owners[path] = xml
        size, stated = read_size(path), stated_size(root)
        lying = stated == size.stored != size.loaded
        wrong = stated not in (size.stored, size.loaded)
        quarter = size.orientation >= 5
        if wrong and quarter and stated == size.loaded[::-1]:
            raise ConverterError(
                f'{xml}: its boxes are those of the turned photo, and the '
                f'image loader does not turn {path}; save it upright'
            )
        told = quarter and not wrong and len(set(size.stored)) == 2
        counts['lying'] += lying
        counts['size'] += wrong
        counts['unclear'] += size.orientation > 1 and not told
        image = LabelledImage(path, size.loaded)
        for node in root.iter('object'):
            label = (node.findtext('name') or '').strip()
            corners = read_box(node, xml, zero_based)
            if lying:
                corners = turn_corners(corners, size.stored, size.orientation)
            hard = (node.findtext('difficult') or '0').strip() == '1'
            if hard and difficult == 'drop':
                counts['difficult'] += 1
                continue
            crowd = hard and difficult == 'ignore'
            label = (rename or {}).get(label, label)
            image.boxes.append(LabelledBox(label, corners, crowd))
        images.append(image)
    for key, text in NOTES.items():
        if counts[key]:
            logger.warning(text, counts[key])
    return images


def choose_classes(
    images: Sequence[LabelledImage], classes: Sequence[str] | None
) -> list[str]:
    """Check the classes that are wanted, or take all that occur, sorted."""
    found = {box.label: i.path for i in reversed(images) for box in i.boxes}
    if classes is None and not found:
        raise ConverterError(
            'there is no box in any file, so the classes are not known; '
            'name them with --classes'
        )
    classes = sorted(found) if classes is None else list(classes)
    check_classes(classes, '--classes')
    for label in sorted(set(found) - set(classes)):
        raise ConverterError(
            f'the boxes of {found[label]}: class {label!r} is not one of '
            f'{classes}; add it to --classes or use --rename'
        )
    return classes


def voc_to_coco(
    xmls: Sequence[Path],
    img_dir: str | Path,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> dict:
    """Convert annotation files to the content of a COCO file."""
    images = read_voc(xmls, ImageFolder(img_dir), rename)
    return to_coco(images, Path(img_dir), choose_classes(images, classes))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(
        'Convert Pascal VOC xml files to COCO json', 'xml_dir'
    )
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
    args = parse_output(parser, argv)
    if any(pair.count('=') != 1 for pair in args.rename):
        parser.error('--rename wants OLD=NEW')
    return args


def convert(args: argparse.Namespace) -> None:
    """Convert and write, as the command line says."""
    folder = ImageFolder(args.img_dir)
    images = read_voc(
        list_xmls(args.xml_dir, args.split),
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
    """Run the tool and return the exit code."""
    return run_tool(convert, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
