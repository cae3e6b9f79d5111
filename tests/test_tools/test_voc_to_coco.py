"""``voc_to_coco.py`` and what it shares with the other converters."""

import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import mmcv
import numpy as np
import pytest
import voc_to_coco as voc
from PIL import Image

FOLDER = Path(__file__).parents[2] / 'tools' / 'dataset_converters'


def write_voc(root, name, boxes, size=(40, 30), stated=None, suffix='.png'):
    """Write an image and its xml; boxes are (class, corners, difficult)."""
    for folder in ('xml', 'img'):
        (root / folder).mkdir(exist_ok=True, parents=True)
    Image.new('RGB', size).save(root / 'img' / f'{name}{suffix}')
    width, height = stated or size
    objects = ''.join(
        f'<object><name>{label}</name><difficult>{hard}</difficult><bndbox>'
        f'<xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax>'
        f'<ymax>{b[3]}</ymax></bndbox></object>'
        for label, b, hard in boxes
    )
    (root / 'xml' / f'{name}.xml').write_text(
        f'<annotation><filename>{name}{suffix}</filename><size>'
        f'<width>{width}</width><height>{height}</height></size>'
        f'{objects}</annotation>'
    )


def run(root, *options):
    out = root / 'out.json'
    arguments = [root / 'xml', root / 'img', out, *options]
    code = voc.main([str(a) for a in arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def boxes_of(coco):
    return [a['bbox'] for a in coco['annotations']]


def files_of(coco):
    return [i['file_name'] for i in coco['images']]


def size_of(coco):
    info = coco['images'][0]
    return info['width'], info['height']


def test_boxes_count_pixels_from_one(tmp_path):
    write_voc(tmp_path, 'a', [('cat', (1, 1, 40, 30), 0)])
    write_voc(tmp_path, 'b', [('ant', (3, 4, 3, 5), 0)])
    code, coco = run(tmp_path)
    assert code == 0
    assert boxes_of(coco) == [[0, 0, 40, 30], [2, 3, 1, 2]]
    assert [a['area'] for a in coco['annotations']] == [1200, 2]
    assert [c['name'] for c in coco['categories']] == ['ant', 'cat']
    assert [a['category_id'] for a in coco['annotations']] == [2, 1]
    assert files_of(coco) == ['a.png', 'b.png']
    _, coco = run(tmp_path, '--zero-based')
    assert boxes_of(coco) == [[1, 1, 39, 29]]  # the other has no area


def test_the_size_of_the_image_counts(tmp_path, caplog):
    boxes = [('x', (31, 1, 99, 99), 0), ('x', (9, 9, 5, 20), 0)]
    write_voc(
        tmp_path, 'a', [*boxes, ('x', (50, 1, 60, 9), 0)], (40, 30), (99, 99)
    )
    with caplog.at_level('INFO'):
        _, coco = run(tmp_path)
    assert size_of(coco) == (40, 30)
    assert boxes_of(coco) == [[30, 0, 10, 30]]
    assert '1 files state no or a wrong image size' in caplog.text
    assert 'dropped 2 boxes without area' in caplog.text


@pytest.mark.parametrize(
    ('mode', 'crowds'), [('ignore', [0, 1]), ('keep', [0, 0]), ('drop', [0])]
)
def test_difficult(tmp_path, mode, crowds):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0), ('x', (1, 1, 8, 8), 1)])
    _, coco = run(tmp_path, '--difficult', mode)
    assert [a['iscrowd'] for a in coco['annotations']] == crowds


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_split_classes_and_rename(tmp_path, encoding):
    write_voc(tmp_path, 'a', [('Dog', (1, 1, 9, 9), 0)])
    for name in 'bcd':
        write_voc(tmp_path, name, [])
    split = tmp_path / 'train.txt'
    split.write_text('c 1\nb -1\n\na  1\n', encoding)
    options = ['--classes', 'cat', 'dog', '--rename', 'Dog=dog']
    code, coco = run(tmp_path, '--split', split, *options)
    assert code == 0
    assert files_of(coco) == ['c.png', 'a.png']
    assert coco['annotations'][0]['category_id'] == 2
    assert coco['annotations'][0]['image_id'] == coco['images'][1]['id']


def test_names_in_a_split(tmp_path):
    (tmp_path / 'photo 1.xml').touch()
    split = tmp_path / 's.txt'
    split.write_text('photo 1\na b  1\nc.jpg\nd\t-1\n\nc\ne.2\n')
    names = voc.read_split(split, tmp_path)
    assert names == ['photo 1', 'a b', 'c', 'e.2']


@pytest.mark.parametrize(
    ('stated', 'encoding', 'word'),
    [
        ('gb2312', 'gb18030', '猫镕'),  # the second is not in GB2312
        ('Shift_JIS', 'cp932', '猫①'),
        ('utf8', 'utf-8', 'Zürich'),
        ('UTF-8', 'utf-8-sig', 'Zürich'),
        ('utf-16', 'utf-16', '猫'),
        ('iso-8859-1', 'latin-1', 'Löwe'),
        ('utf-8', 'gbk', None),
        ('klingon', 'ascii', None),
        ('hex', 'ascii', None),
    ],
)
def test_encodings(tmp_path, caplog, stated, encoding, word):
    write_voc(tmp_path, 'a', [('WORD', (1, 1, 9, 9), 0)])
    xml = tmp_path / 'xml' / 'a.xml'
    text = xml.read_text().replace('WORD', word or '狗'[encoding == 'ascii' :])
    text = f'<?xml version="1.0" encoding="{stated}"?>\n{text}'
    xml.write_bytes(text.encode(encoding))
    code, coco = run(tmp_path)
    if word:
        assert [c['name'] for c in coco['categories']] == [word]
    else:
        assert (code, coco) == (1, None)
        assert 'a.xml' in caplog.text and stated in caplog.text


@pytest.mark.parametrize(
    ('names', 'stated', 'chosen'),
    [
        (['a.JPG'], 'a.png', 'a.JPG'),
        (['a.jpg', 'b.jpg'], 'b.jpg', 'a.jpg'),
        (['b.jpg', 'c.jpg'], 'C:\\photos\\b.jpg', 'b.jpg'),
        (['a.jpg', 'a.png'], 'a.png', 'a.png'),
        (['x/y/a.Jpeg', '._a.jpg'], '', 'x/y/a.Jpeg'),
        (['cafe\u0301.jpg'], 'caf\u00e9.jpg', 'cafe\u0301.jpg'),
        (['a.jpg', 'x/a.jpg'], 'a.jpg', None),
        (['b.jpg'], '', None),
    ],
)
def test_the_image_of_a_file(tmp_path, names, stated, chosen):
    for name in names:
        path = tmp_path / 'img' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root = ElementTree.fromstring(f'<a><filename>{stated}</filename></a>')
    folder = voc.ImageFolder(tmp_path / 'img')
    xml = tmp_path / 'xml' / 'a.xml'
    if chosen is None:
        with pytest.raises(voc.ConverterError, match='a.xml'):
            voc.find_image(root, xml, folder)
    else:
        found = voc.find_image(root, xml, folder)
        assert found.relative_to(folder.root).as_posix() == chosen


def test_images_beside_their_xml(tmp_path):
    for part in 'xy':
        write_voc(tmp_path / part, 'a', [(part, (1, 1, 9, 9), 0)])
        (tmp_path / part / 'xml' / 'a.xml').rename(
            tmp_path / part / 'img' / 'a.xml'
        )
    out = tmp_path / 'o.json'
    assert voc.main([*[str(tmp_path)] * 2, str(out)]) == 0
    coco = json.loads(out.read_text())
    assert files_of(coco) == ['x/img/a.png', 'y/img/a.png']


def test_images_without_xml_are_told(tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    write_voc(tmp_path, 'b', [])
    (tmp_path / 'xml' / 'b.xml').unlink()
    assert run(tmp_path)[0] == 0
    assert '1 images' in caplog.text and 'left out' in caplog.text


def save_tagged(path, orientation, size=(40, 30), box=(5, 2, 15, 20)):
    """Save a photo with an EXIF tag, a white box on black.

    Returns size and box, x, y, width and height, as the image loader shows
    them.
    """
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {'.jpg': dict(quality=100, subsampling=0)}
    exact['.webp'] = dict(lossless=True)
    path.parent.mkdir(exist_ok=True)
    options = exact.get(path.suffix, {})
    Image.fromarray(pixels).save(path, exif=exif, **options)
    white = mmcv.imread(str(path))[..., 0] > 128
    rows, columns = white.any(1).nonzero()[0], white.any(0).nonzero()[0]
    x, y = columns[0], rows[0]
    return white.shape[::-1], [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y]


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif', '.webp'])
@pytest.mark.parametrize(
    ('orientation', 'stated'),
    [
        *((orientation, '{}') for orientation in (1, 5, 6, 7, 8, 9)),
        *((6, stated) for stated in (' {}\n', '{}.0')),
    ],
)
def test_boxes_on_photos_with_an_orientation(
    tmp_path, suffix, orientation, stated
):
    """They were drawn on the photo as it is stored."""
    stated = [stated.format(length) for length in (40, 30)]
    box = ('x', (6, 3, 15, 20), 0)
    write_voc(tmp_path, 'a', [box], stated=stated, suffix=suffix)
    path = tmp_path / 'img' / f'a{suffix}'
    size, box = save_tagged(path, orientation)
    _, coco = run(tmp_path)
    assert size_of(coco) == size
    assert boxes_of(coco) == [box]


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_boxes_of_the_upright_photo(tmp_path, orientation):
    box = ('x', (1, 1, 10, 35), 0)
    write_voc(tmp_path, 'a', [box], stated=(30, 40))
    save_tagged(tmp_path / 'img' / 'a.png', orientation)
    _, coco = run(tmp_path)
    assert boxes_of(coco) == [[0, 0, 10, 35]]


def test_boxes_turned_unlike_the_loader(tmp_path, caplog):
    box = ('x', (1, 1, 10, 35), 0)
    write_voc(tmp_path, 'a', [box], stated=(30, 40), suffix='.webp')
    size, _ = save_tagged(tmp_path / 'img' / 'a.webp', 6)
    if size == (30, 40):
        pytest.skip('this OpenCV follows the orientation of WebP files')
    assert run(tmp_path) == (1, None)
    assert 'does not turn' in caplog.text and 'a.webp' in caplog.text


@pytest.mark.parametrize(('orientation', 'height'), [(3, 30), (6, 40)])
def test_a_size_that_tells_nothing(tmp_path, caplog, orientation, height):
    """Of photos turned by half or square ones the boxes are not moved."""
    size = (40, height)
    write_voc(tmp_path, 'a', [('x', (6, 3, 15, 20), 0)], size)
    save_tagged(tmp_path / 'img' / 'a.png', orientation, size)
    _, coco = run(tmp_path)
    assert boxes_of(coco) == [[5, 2, 10, 18]]
    assert '1 photos are turned or mirrored' in caplog.text


def test_split_of_images(tmp_path):
    for i in range(10):
        write_voc(tmp_path, f'a{i}', [('x', (1, 1, 9, 9), 0)])
    options = ['--val-fraction', '0.3', '--val-out', tmp_path / 'val.json']

    def names(*more):
        code, train = run(tmp_path, *options, *more)
        assert code == 0
        val = json.loads((tmp_path / 'val.json').read_text())
        assert train['categories'] == val['categories']
        return files_of(train), files_of(val)

    train, val = names()
    assert len(train) == 7 and len(val) == 3
    assert sorted(train + val) == [f'a{i}.png' for i in range(10)]
    assert names() == (train, val)
    assert names('--seed', '1') != (train, val)
    options[1] = '0.01'
    assert run(tmp_path, *options)[0] == 1
    for wrong in (options[:2], [*options, '--val-out', tmp_path / 'out.json']):
        with pytest.raises(SystemExit):
            run(tmp_path, *wrong)


def test_a_class_without_a_box_is_told(tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    with caplog.at_level('INFO'):
        run(tmp_path, '--classes', 'x', 'big tree')
    assert "1 boxes: 'x' 1, 'big tree' 0" in caplog.text
    assert "no box of ['big tree']" in caplog.text


@pytest.mark.parametrize(
    ('old', 'new', 'expected'),
    [
        ('xmin', 'left', 'a.xml: unreadable bndbox'),
        ('>9<', '>nan<', 'a.xml: a bndbox is not finite'),
        ('</annotation>', '', 'a.xml is not xml'),
    ],
)
def test_damaged_files_are_named(tmp_path, caplog, old, new, expected):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    xml = tmp_path / 'xml' / 'a.xml'
    xml.write_text(xml.read_text().replace(old, new))
    assert run(tmp_path) == (1, None)
    assert expected in caplog.text


@pytest.mark.parametrize(
    ('change', 'options', 'expected'),
    [
        ('rm xml/a.xml', [], 'no xml file found'),
        ('mv img/a.png img/b.png', [], 'missing'),
        ('mv img images', [], 'does not exist'),
        ('echo > img/a.png', [], 'cannot read image'),
        ('cp xml/a.xml xml/b.xml', [], 'same image'),
        ('true', ['--classes', 'x', 'x'], 'unique'),
        ('true', ['--classes', 'y'], "'x' is not one of"),
        ('printf "a\\nb\\n" > s', ['--split', 's'], 'b.xml'),
        ('printf "\\260" > s', ['--split', 's'], 's is not text'),
    ],
)
def test_errors_name_the_cause(
    tmp_path, caplog, monkeypatch, change, options, expected
):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    monkeypatch.chdir(tmp_path)
    subprocess.run(change, shell=True, check=True)
    assert run(tmp_path, *options) == (1, None)
    assert expected in caplog.text


def test_runs_as_a_script(quick_python, tmp_path):
    write_voc(tmp_path, 'a', [('x', (1, 1, 99, 9), 0)], stated=(1, 1))
    command = [quick_python, FOLDER / 'voc_to_coco.py', tmp_path / 'xml']
    command += [tmp_path / 'img', tmp_path / 'o.json']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    warning, summary = done.stderr.splitlines()
    assert warning.startswith('warning: 1 files state')
    assert summary.endswith("1 images (0 without boxes), 1 boxes: 'x' 1")
    command[2] = tmp_path / 'nowhere'
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: no xml file found')
