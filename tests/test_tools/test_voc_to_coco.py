import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

FOLDER = Path(__file__).parents[2] / 'tools' / 'dataset_converters'


@pytest.fixture
def tools(monkeypatch):
    """Import the converters as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import converter_utils
    import fetch_wheel_members
    import labelled_images
    import tile_coco
    import tree_crowns
    import voc_to_coco

    class Tools:
        utils = converter_utils
        fetch = fetch_wheel_members
        images = labelled_images
        tile = tile_coco
        crowns = tree_crowns
        voc = voc_to_coco

    return Tools


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


def run_voc(tools, root, *options):
    out = root / 'out.json'
    arguments = [root / 'xml', root / 'img', out, *options]
    code = tools.voc.main([str(a) for a in arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_voc_box_counts_pixels_from_one(tools, tmp_path):
    write_voc(tmp_path, 'a', [('cat', (1, 1, 40, 30), 0)])
    write_voc(tmp_path, 'b', [('ant', (3, 4, 3, 5), 0)])
    code, coco = run_voc(tools, tmp_path)
    assert code == 0
    boxes = [a['bbox'] for a in coco['annotations']]
    assert boxes == [[0, 0, 40, 30], [2, 3, 1, 2]]
    assert [a['area'] for a in coco['annotations']] == [1200, 2]
    assert [c['name'] for c in coco['categories']] == ['ant', 'cat']
    assert [a['category_id'] for a in coco['annotations']] == [2, 1]
    assert [i['file_name'] for i in coco['images']] == ['a.png', 'b.png']


def test_voc_zero_based(tools, tmp_path):
    write_voc(tmp_path, 'a', [('cat', (3, 4, 13, 24), 0)])
    _, coco = run_voc(tools, tmp_path, '--zero-based')
    assert coco['annotations'][0]['bbox'] == [3, 4, 10, 20]


def test_voc_image_size_beats_xml(tools, tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (31, 1, 99, 99), 0)], stated=(99, 99))
    with caplog.at_level('INFO'):
        _, coco = run_voc(tools, tmp_path)
    assert (coco['images'][0]['width'], coco['images'][0]['height']) == (
        40,
        30,
    )
    assert coco['annotations'][0]['bbox'] == [30, 0, 10, 30]
    assert '1 files state no or a wrong image size' in caplog.text


def test_voc_drops_boxes_without_area(tools, tmp_path, caplog):
    boxes = [('x', (9, 9, 5, 20), 0), ('x', (50, 1, 60, 9), 0)]
    write_voc(tmp_path, 'a', [*boxes, ('x', (1, 1, 2, 2), 0)])
    with caplog.at_level('INFO'):
        code, coco = run_voc(tools, tmp_path)
    assert code == 0 and len(coco['annotations']) == 1
    assert 'dropped 2 boxes without area' in caplog.text


@pytest.mark.parametrize(
    ('mode', 'crowds'), [('ignore', [0, 1]), ('keep', [0, 0]), ('drop', [0])]
)
def test_voc_difficult(tools, tmp_path, mode, crowds):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0), ('x', (1, 1, 8, 8), 1)])
    _, coco = run_voc(tools, tmp_path, '--difficult', mode)
    assert [a['iscrowd'] for a in coco['annotations']] == crowds


def test_voc_split_classes_and_rename(tools, tmp_path):
    write_voc(tmp_path, 'a', [('Dog', (1, 1, 9, 9), 0)])
    write_voc(tmp_path, 'b', [])
    write_voc(tmp_path, 'c', [])
    split = tmp_path / 'train.txt'
    split.write_text('c 1\nb -1\n\na  1\n')
    options = ['--classes', 'cat', 'dog', '--rename', 'Dog=dog']
    code, coco = run_voc(tools, tmp_path, '--split', split, *options)
    assert code == 0
    assert [i['file_name'] for i in coco['images']] == ['c.png', 'a.png']
    assert coco['annotations'][0]['category_id'] == 2
    assert coco['annotations'][0]['image_id'] == coco['images'][1]['id']


def test_voc_other_suffix_than_stated(tools, tmp_path):
    write_voc(tmp_path, 'a', [])
    (tmp_path / 'img' / 'a.png').rename(tmp_path / 'img' / 'a.JPG')
    _, coco = run_voc(tools, tmp_path, '--classes', 'x')
    assert coco['images'][0]['file_name'] == 'a.JPG'


@pytest.mark.parametrize(
    ('names', 'stated', 'chosen'),
    [
        (['a.jpg', 'b.jpg'], 'b.jpg', 'a.jpg'),
        (['b.jpg', 'c.jpg'], 'C:\\photos\\b.jpg', 'b.jpg'),
        (['a.jpg', 'a.png'], 'a.png', 'a.png'),
        (['x/y/a.Jpeg', '._a.jpg'], '', 'x/y/a.Jpeg'),
        (['cafe\u0301.jpg'], 'caf\u00e9.jpg', 'cafe\u0301.jpg'),
        (['a.jpg', 'x/a.jpg'], 'a.jpg', None),
        (['b.jpg'], '', None),
    ],
)
def test_voc_finds_the_image(tools, tmp_path, names, stated, chosen):
    for name in names:
        path = tmp_path / 'img' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path)
    root = ElementTree.fromstring(f'<a><filename>{stated}</filename></a>')
    folder = tools.images.ImageFolder(tmp_path / 'img')
    xml = tmp_path / 'xml' / 'a.xml'
    if chosen is None:
        with pytest.raises(tools.utils.ConverterError, match='a.xml'):
            tools.voc.find_image(root, xml, folder)
    else:
        found = tools.voc.find_image(root, xml, folder)
        assert found.relative_to(folder.root).as_posix() == chosen


def test_voc_image_beside_its_xml(tools, tmp_path):
    for part in 'xy':
        write_voc(tmp_path / part, 'a', [(part, (1, 1, 9, 9), 0)])
        (tmp_path / part / 'xml' / 'a.xml').rename(
            tmp_path / part / 'img' / 'a.xml'
        )
    out = tmp_path / 'o.json'
    assert tools.voc.main([*[str(tmp_path)] * 2, str(out)]) == 0
    coco = json.loads(out.read_text())
    names = [i['file_name'] for i in coco['images']]
    assert names == ['x/img/a.png', 'y/img/a.png']


def test_voc_two_files_of_one_image(tools, tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    text = (tmp_path / 'xml' / 'a.xml').read_text()
    (tmp_path / 'xml' / 'b.xml').write_text(text)
    assert run_voc(tools, tmp_path)[0] == 1
    assert 'same image' in caplog.text


def test_voc_split_names(tools, tmp_path):
    (tmp_path / 'photo 1.xml').touch()
    split = tmp_path / 's.txt'
    split.write_text('photo 1\na b  1\nc.jpg\nd\t-1\n\nc\ne.2\n')
    names = tools.voc.read_split(split, tmp_path)
    assert names == ['photo 1', 'a b', 'c', 'e.2']


def test_voc_images_without_xml_are_told(tools, tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    write_voc(tmp_path, 'b', [])
    (tmp_path / 'xml' / 'b.xml').unlink()
    assert run_voc(tools, tmp_path)[0] == 0
    assert '1 images' in caplog.text and 'left out' in caplog.text


def save_turned(path, orientation, size=(40, 30), box=(5, 2, 15, 20)):
    """Save a photo that is to be turned, with a white box on black."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(path))) > 0
    rows, columns = upright.any(1).nonzero()[0], upright.any(0).nonzero()[0]
    return [
        columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    ]  # fmt: skip


@pytest.mark.parametrize('orientation', [1, 5, 6, 7, 8])
def test_voc_turned_photo(tools, tmp_path, orientation):
    """Boxes that were drawn on the photo as it lies are turned with it."""
    write_voc(tmp_path, 'a', [('x', (6, 3, 15, 20), 0)])
    path = tmp_path / 'img' / 'a.png'
    x1, y1, x2, y2 = save_turned(path, orientation)
    _, coco = run_voc(tools, tmp_path)
    assert coco['annotations'][0]['bbox'] == [x1, y1, x2 - x1, y2 - y1]
    info = coco['images'][0]
    size = (40, 30) if orientation == 1 else (30, 40)
    assert (info['width'], info['height']) == size
    assert tools.images.read_size(path) == size


def test_voc_boxes_of_the_upright_photo(tools, tmp_path):
    write_voc(tmp_path, 'a', [('x', (1, 1, 10, 35), 0)], stated=(30, 40))
    save_turned(tmp_path / 'img' / 'a.png', 6)
    _, coco = run_voc(tools, tmp_path)
    assert coco['annotations'][0]['bbox'] == [0, 0, 10, 35]


def test_split_of_images(tools, tmp_path):
    for i in range(10):
        write_voc(tmp_path, f'a{i}', [('x', (1, 1, 9, 9), 0)])
    options = ['--val-fraction', '0.3', '--val-out', tmp_path / 'val.json']

    def names(*more):
        code, train = run_voc(tools, tmp_path, *options, *more)
        assert code == 0
        val = json.loads((tmp_path / 'val.json').read_text())
        assert train['categories'] == val['categories']
        return [
            [i['file_name'] for i in part['images']] for part in (train, val)
        ]

    train, val = names()
    assert len(train) == 7 and len(val) == 3
    assert sorted(train + val) == [f'a{i}.png' for i in range(10)]
    assert names() == [train, val]
    assert names('--seed', '1') != [train, val]
    options[1] = '0.01'
    assert run_voc(tools, tmp_path, *options)[0] == 1
    for wrong in (options[:2], [*options, '--val-out', tmp_path / 'out.json']):
        with pytest.raises(SystemExit):
            run_voc(tools, tmp_path, *wrong)


def test_class_without_a_box_is_told(tools, tmp_path, caplog):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    with caplog.at_level('INFO'):
        run_voc(tools, tmp_path, '--classes', 'x', 'big tree')
    assert "1 boxes: 'x' 1, 'big tree' 0" in caplog.text
    assert "no box of ['big tree']" in caplog.text


@pytest.mark.parametrize(
    'case',
    [
        'no xml',
        'no image',
        'no folder',
        'class',
        'twice',
        'box',
        'nan',
        'split',
        'not xml',
    ],
)
def test_voc_errors_name_the_cause(tools, tmp_path, caplog, case):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    xml, options = tmp_path / 'xml' / 'a.xml', []
    expected = 'a.xml'
    if case == 'no xml':
        xml.unlink()
        expected = 'no xml file found'
    elif case == 'no image':
        (tmp_path / 'img' / 'a.png').rename(tmp_path / 'img' / 'b.png')
        expected = 'missing'
    elif case == 'no folder':
        (tmp_path / 'img').rename(tmp_path / 'images')
        expected = 'does not exist'
    elif case == 'twice':
        options = ['--classes', 'x', 'x']
        expected = 'unique'
    elif case == 'nan':
        xml.write_text(xml.read_text().replace('>9<', '>nan<'))
        expected = 'not finite'
    elif case == 'class':
        options = ['--classes', 'y']
        expected = "'x' is not one of"
    elif case == 'box':
        xml.write_text(xml.read_text().replace('xmin', 'left'))
        expected = 'unreadable bndbox'
    elif case == 'split':
        (tmp_path / 's.txt').write_text('a\nb\n')
        options = ['--split', tmp_path / 's.txt']
        expected = 'b.xml'
    else:
        xml.write_text('<annotation>')
    code, coco = run_voc(tools, tmp_path, *options)
    assert code == 1 and coco is None
    assert expected in caplog.text


def test_tree_crowns_cuts_once(tools, tmp_path, monkeypatch):
    photos = tmp_path / 'photos'
    splits = {
        'train': (('p',), 0, True, 2, 2),
        'val': (('q',), 0, False, 1, 0),
    }
    monkeypatch.setattr(tools.crowns, 'SPLITS', splits)
    boxes = [('Tree', (1, 1, 20, 20), 0), ('Tree', (290, 1, 320, 20), 0)]
    for name, found in (('p', boxes), ('q', [])):
        write_voc(tmp_path, name, found, size=(400, 300))
    (tmp_path / 'img').rename(photos)
    for xml in (tmp_path / 'xml').iterdir():
        xml.rename(photos / xml.name)
    calls = []
    monkeypatch.setattr(
        tools.crowns, 'fetch_wheel_members', lambda *a: calls.append(a)
    )
    splits['val'] = (('q',), 0, False, 4, 0)
    assert tools.crowns.main(['--out-dir', str(tmp_path)]) == 0
    train = json.loads((tmp_path / 'annotations' / 'train.json').read_text())
    assert [c['name'] for c in train['categories']] == ['tree']
    assert tools.crowns.main(['--out-dir', str(tmp_path)]) == 0
    assert len(calls) == 1
    next((tmp_path / 'val').iterdir()).unlink()
    assert tools.crowns.main(['--out-dir', str(tmp_path)]) == 0
    assert len(calls) == 2


def test_tree_crowns_notices_edited_photos(tools, tmp_path, monkeypatch):
    write_voc(tmp_path, 'p', [('Tree', (1, 1, 9, 9), 0)])
    (tmp_path / 'xml' / 'p.xml').rename(tmp_path / 'img' / 'p.xml')
    (tmp_path / 'img').rename(tmp_path / 'photos')
    splits = {'val': (('p',), 0, False, 1, 2)}
    monkeypatch.setattr(tools.crowns, 'SPLITS', splits)
    with pytest.raises(tools.utils.ConverterError, match='instead of'):
        tools.crowns.make_split(tmp_path, 'val')


def test_runs_as_a_script(tmp_path):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    command = [sys.executable, FOLDER / 'voc_to_coco.py', tmp_path / 'xml']
    command += [tmp_path / 'img', tmp_path / 'o.json']
    assert subprocess.run(command).returncode == 0
    command[2] = tmp_path / 'nowhere'
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and 'no xml file found' in failed.stderr
