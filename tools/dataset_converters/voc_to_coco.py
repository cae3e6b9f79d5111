"""Convert Pascal VOC annotations (one xml an image) to one COCO json file.

Example:
    python tools/dataset_converters/voc_to_coco.py VOC2007/Annotations \
        VOC2007/JPEGImages annotations/train.json \
        --split VOC2007/ImageSets/Main/train.txt
"""

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from converter_utils import ConverterError, logger, run_tool, write_json
from PIL import Image

IMG_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
EXIF_ORIENTATION = 0x0112


def list_xmls(xml_dir: str | Path, split: str | Path | None) -> list[Path]:
    """List the annotation files.

    Args:
        xml_dir (str or Path): Folder of the xml files.
        split (str or Path, optional): File with one name a line, as in
            ``ImageSets/Main``. Names whose second column is -1 (image
            without the class of the file) are left out.

    Returns:
        list[Path]: Paths, sorted or in the order of the split file.
    """
    xml_dir = Path(xml_dir)
    if split is None:
        paths = sorted(xml_dir.glob('*.xml'))
    else:
        rows = [row.split() for row in Path(split).read_text().splitlines()]
        names = [row[0] for row in rows if row and row[1:2] != ['-1']]
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


def find_image(root: ElementTree.Element, xml: Path, img_dir: Path) -> Path:
    """Find the image of an annotation file.

    The file name in the xml counts first, then the name of the xml file with
    any image suffix.

    Args:
        root (Element): Parsed xml.
        xml (Path): Path of the xml file.
        img_dir (Path): Folder of the images.

    Returns:
        Path: The image.
    """
    named = (root.findtext('filename') or '').strip()
    candidates = [img_dir / named] if named else []
    for stem in dict.fromkeys([xml.stem, Path(named).stem]):
        for suffix in IMG_SUFFIXES:
            candidates += [
                img_dir / f'{stem}{suffix}',
                img_dir / f'{stem}{suffix.upper()}',
            ]
    for path in candidates:
        if path.is_file():
            return path
    raise ConverterError(f'image of {xml} is missing in {img_dir}: {named}')


def read_size(path: Path) -> tuple[int, int]:
    """Read the size of an image as the image loader will see it.

    Args:
        path (Path): The image.

    Returns:
        tuple[int, int]: Width and height, after the EXIF orientation.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            width, height = image.size
    except OSError as error:
        raise ConverterError(f'cannot read image {path}: {error}') from error
    return (height, width) if turned else (width, height)


def read_box(
    node: ElementTree.Element,
    size: tuple[int, int],
    xml: Path,
    zero_based: bool = False,
) -> list[float]:
    """Read one box and clip it to the image.

    Args:
        node (Element): The ``object`` element.
        size (tuple[int, int]): Width and height of the image.
        xml (Path): Path of the xml file, for messages.
        zero_based (bool): False: corners are numbers of pixels that begin at
            1 and both belong to the box, as in Pascal VOC. True: corners are
            plain coordinates that begin at 0. Defaults to False.

    Returns:
        list[float]: COCO box, x, y, width and height.
    """
    try:
        x1, y1, x2, y2 = (
            float(node.findtext(f'bndbox/{key}'))
            for key in ('xmin', 'ymin', 'xmax', 'ymax')
        )
    except (TypeError, ValueError) as error:
        raise ConverterError(f'{xml}: unreadable bndbox') from error
    if not zero_based:
        x1, y1 = x1 - 1, y1 - 1
    x1, x2 = (min(max(value, 0), size[0]) for value in (x1, x2))
    y1, y2 = (min(max(value, 0), size[1]) for value in (y1, y2))
    return [x1, y1, x2 - x1, y2 - y1]


def voc_to_coco(
    xmls: Sequence[Path],
    img_dir: str | Path,
    classes: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    zero_based: bool = False,
    difficult: str = 'ignore',
) -> dict:
    """Convert annotation files.

    Args:
        xmls (Sequence[Path]): The xml files.
        img_dir (str or Path): Folder of the images.
        classes (Sequence[str], optional): Class names in their order.
            Defaults to None, which means all that occur, sorted.
        rename (Mapping[str, str], optional): New names of classes. Defaults
            to None.
        zero_based (bool): See :func:`read_box`. Defaults to False.
        difficult (str): What becomes of boxes marked difficult: 'ignore'
            (``iscrowd=1``, neither hit nor miss), 'keep' or 'drop'. Defaults
            to 'ignore'.

    Returns:
        dict: Content of a COCO file.
    """
    images, found, counts = [], [], Counter()
    for image_id, xml in enumerate(xmls, start=1):
        try:
            root = ElementTree.parse(xml).getroot()
        except ElementTree.ParseError as error:
            raise ConverterError(f'{xml} is not xml: {error}') from error
        path = find_image(root, xml, Path(img_dir))
        width, height = size = read_size(path)
        stated = (root.findtext('size/width'), root.findtext('size/height'))
        if stated != (str(width), str(height)):
            counts['size'] += 1
        name = path.relative_to(img_dir).as_posix()
        images.append(
            dict(id=image_id, file_name=name, width=width, height=height)
        )
        for node in root.iter('object'):
            label = (node.findtext('name') or '').strip()
            label = (rename or {}).get(label, label)
            if classes is not None and label not in classes:
                raise ConverterError(
                    f'{xml}: class {label!r} is not one of {list(classes)}'
                )
            box = read_box(node, size, xml, zero_based)
            hard = (node.findtext('difficult') or '0').strip() == '1'
            if box[2] <= 0 or box[3] <= 0:
                counts['degenerate'] += 1
            elif hard and difficult == 'drop':
                counts['difficult'] += 1
            else:
                crowd = int(hard and difficult == 'ignore')
                found.append((image_id, label, box, crowd))
    if classes is None:
        classes = sorted({label for _, label, _, _ in found})
    if counts['size']:
        logger.warning(
            '%d files state no or a wrong image size; the images count',
            counts['size'],
        )
    if counts['degenerate']:
        logger.warning('dropped %d boxes without area', counts['degenerate'])
    if counts['difficult']:
        logger.info('dropped %d difficult boxes', counts['difficult'])
    numbers = {label: i for i, label in enumerate(classes, start=1)}
    annotations = [
        dict(
            id=i,
            image_id=image_id,
            category_id=numbers[label],
            bbox=box,
            area=box[2] * box[3],
            iscrowd=crowd,
        )
        for i, (image_id, label, box, crowd) in enumerate(found, start=1)
    ]
    categories = [dict(id=i, name=label) for label, i in numbers.items()]
    return dict(images=images, annotations=annotations, categories=categories)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Convert Pascal VOC xml files to a COCO json file'
    )
    parser.add_argument('xml_dir', help='folder of the xml files')
    parser.add_argument('img_dir', help='folder of the images')
    parser.add_argument('out', help='json file to write')
    parser.add_argument('--split', help='file with one name a line')
    parser.add_argument('--classes', nargs='+', help='class names, in order')
    parser.add_argument(
        '--rename', nargs='+', default=[], metavar='OLD=NEW', help='classes'
    )
    parser.add_argument(
        '--zero-based',
        action='store_true',
        help='coordinates begin at 0 and xmax, ymax lie outside the box',
    )
    parser.add_argument(
        '--difficult', choices=('ignore', 'keep', 'drop'), default='ignore'
    )
    args = parser.parse_args(argv)
    if any(pair.count('=') != 1 for pair in args.rename):
        parser.error('--rename wants OLD=NEW')
    return args


def convert(args: argparse.Namespace) -> None:
    """Convert and write, as the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    coco = voc_to_coco(
        list_xmls(args.xml_dir, args.split),
        args.img_dir,
        classes=args.classes,
        rename=dict(pair.split('=') for pair in args.rename),
        zero_based=args.zero_based,
        difficult=args.difficult,
    )
    write_json(coco, args.out)
    logger.info(
        '%s: %d images, %d boxes, classes %s',
        args.out,
        len(coco['images']),
        len(coco['annotations']),
        [category['name'] for category in coco['categories']],
    )


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
