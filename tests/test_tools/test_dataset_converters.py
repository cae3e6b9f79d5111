"""What the converters share, tiles, wheels, the data of the quick start."""

import hashlib
import json
import re
import subprocess
import zipfile
from pathlib import Path

import converter_utils as utils
import cv2
import fetch_wheel_members as fetcher
import mmcv
import numpy as np
import pytest
import tile_coco
import tree_crowns
from PIL import Image

FOLDER = Path(__file__).parents[2] / 'tools' / 'dataset_converters'


def test_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / 'new' / 'a.json'
    with pytest.raises(TypeError):
        utils.write_json({'x': object()}, path)
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
def test_tile_starts(length, overlap, strip, starts):
    assert tile_coco.tile_starts(length, 256, overlap, strip) == starts


def test_tile_keeps_boxes_by_inside_fraction():
    def keep(box, fraction, crowd=0):
        annotation = dict(bbox=box, category_id=3, iscrowd=crowd)
        tile = (100, 100, 200, 200)
        kept = tile_coco.tile_annotations([annotation], tile, fraction)
        return list(kept.values())

    assert keep([90, 100, 20, 10], 0.5) == [
        dict(category_id=3, bbox=[0, 0, 10, 10], area=100, iscrowd=0)
    ]
    assert keep([90, 100, 20, 10], 0.51) == []
    assert len(keep([90, 100, 20, 10], 0.9, crowd=1)) == 1
    assert keep([80, 100, 20, 10], 0.0) == []


def test_tile_pixels_and_boxes_belong_together(tmp_path):
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
    assert tile_coco.main(arguments + options) == 0
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
    assert tile_coco.main(arguments + options + ['--drop-empty']) == 0
    dropped = json.loads(out.read_text())
    assert len(dropped['images']) == len(with_boxes) < len(files)


@pytest.fixture
def cut(tmp_path):
    """Cut images into tiles of 64 pixels.

    Images are arrays by file name; other options of the first image and of
    the only box, 20x20 pixels, may be changed.
    """

    def run(images, box=None, info=None, *options):
        infos = []
        for file_name, pixels in images.items():
            path = tmp_path / 'i' / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            height, width = pixels.shape[:2]
            infos.append(
                dict(id=len(infos), file_name=file_name, height=height)
                | dict(width=width)
            )
        infos[0].update(info or {})
        box = dict(id=1, image_id=0, category_id=1, bbox=[9, 9, 20, 20]) | (
            box or {}
        )
        coco = dict(images=infos, annotations=[box])
        coco['categories'] = [dict(id=1, name='x')]
        (tmp_path / 'a.json').write_text(json.dumps(coco))
        names = ('a.json', 'i', 'o.json', 't')
        argv = [str(tmp_path / name) for name in names]
        code = tile_coco.main([*argv, '--size', '64', *options])
        out = tmp_path / 'o.json'
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


RAMP = np.linspace(0, 1, 128)[None].repeat(64, 0)
GREY = (255 * RAMP).astype(np.uint8)


@pytest.mark.parametrize(
    ('file', 'pixels'),
    [
        ('a.png', (65535 * RAMP).astype(np.uint16)),
        ('a.tif', (4095 * RAMP).astype(np.uint16)),
        ('a.tif', RAMP > 0.5),
        ('a.png', np.stack([GREY] * 4, -1)),
        ('a.tif', RAMP.astype(np.float32)),
        ('a.tif', (70000 * RAMP).astype(np.int32)),
    ],
)
def test_tiles_hold_what_the_loader_shows(cut, tmp_path, caplog, file, pixels):
    code, coco = cut({file: pixels})
    whole = mmcv.imread(str(tmp_path / 'i' / file))
    if whole is None:
        assert (code, coco) == (1, None)
        assert f'cannot read {tmp_path / "i" / file}' in caplog.text
        return
    tiles = [
        mmcv.imread(str(tmp_path / 't' / info['file_name']))
        for info in coco['images']
    ]
    np.testing.assert_array_equal(np.hstack(tiles), whole)


def test_tiles_have_names_of_their_own(cut, tmp_path):
    files = ('x.jpg', 'x.png', 'X.bmp', 'x-2.png', 'a/b.png', 'a_b.png')
    images = {name: np.full_like(GREY, i) for i, name in enumerate(files)}
    _, coco = cut(images)
    names = [info['file_name'] for info in coco['images']]
    assert len({name.lower() for name in names}) == 2 * len(files)
    greys = [cv2.imread(str(tmp_path / 't' / name)).max() for name in names]
    assert greys == [i for i in range(len(files)) for _ in range(2)]


@pytest.mark.parametrize(
    ('box', 'info', 'expected'),
    [
        (dict(image_id='0'), {}, r"annotations\[0\]: its image_id is '0'"),
        (dict(image_id=[0]), {}, r'its image_id is \[0\]'),
        (dict(category_id=2), {}, 'its category_id is 2'),
        (dict(bbox=None), {}, 'its bbox None'),
        (dict(bbox=[]), {}, r'its bbox \[\]'),
        (dict(bbox=['9', '9', '20', '20']), {}, 'its bbox'),
        (dict(bbox=[1, 2, 3, float('nan')]), {}, 'its bbox'),
        ({}, dict(id=None), r'images\[0\], a.png: its id None'),
        ({}, dict(file_name=3), r'images\[0\] has the file_name 3'),
        ({}, dict(file_name='b.png'), 'b.png is missing'),
        ({}, dict(width=127), 'a.png is 128x64, .* the width 127'),
        ({}, dict(height='six'), "the height 'six'"),
    ],
)
def test_faults_of_annotations_are_named(cut, caplog, box, info, expected):
    assert cut({'a.png': GREY}, box, info) == (1, None)
    assert re.search(expected, caplog.text)


@pytest.mark.parametrize('info', [dict(width='128'), dict(height=64.0)])
def test_sizes_in_other_forms(cut, info):
    _, coco = cut({'a.png': GREY}, None, info)
    assert coco['annotations'][0]['bbox'] == [9, 9, 20, 20]


@pytest.mark.parametrize(
    'bbox', [[200, 0, 9, 9], [9, 9, 0, 9], [54, 9, 20, 20]]
)
def test_boxes_in_no_tile_are_told(cut, caplog, bbox):
    code, coco = cut(
        {'a.png': GREY}, dict(bbox=bbox), {}, '--min-fraction', '0.6'
    )
    assert code == 0 and coco['annotations'] == []
    assert '1 of 1 boxes are in no tile' in caplog.text


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('{"images": []}', 'is not a COCO file'),
        ('{"images": 1, "annotations": [], "categories": []}', 'COCO file'),
        ('{', 'is not JSON'),
        ('[' * 100_000, 'is not JSON: maximum recursion'),
        (None, 'does not exist'),
    ],
)
def test_other_files_than_coco(tmp_path, content, expected):
    path = tmp_path / 'a.json'
    if content is not None:
        path.write_text(content, 'utf-8')
    with pytest.raises(utils.ConverterError, match=f'a.json.*{expected}'):
        utils.read_coco(path)


def test_sizes_of_maps_and_scans(tmp_path):
    """More pixels than Pillow opens by default; they are not decoded."""
    path = tmp_path / 'map.png'
    Image.new('1', (14000, 14000), 1).save(path)
    with path.open('r+b') as file:
        file.truncate(500)
    size = utils.read_size(path)
    assert size.loaded == size.stored == (14000, 14000)


@pytest.fixture
def wheel(tmp_path):
    folder = tmp_path / 'wheels'
    folder.mkdir()
    path = folder / 'my_data-1.2-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('my_data/a.txt', 'aaa')
        archive.writestr('my_data/sub/b.txt', 'bbb')
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(tmp_path, digest, *members):
    return fetcher.main(
        ['my-data==1.2', '--sha256', digest, '--dest', str(tmp_path / 'out')]
        + ['--wheel-dir', str(tmp_path / 'wheels'), '--members', *members]
    )


def test_fetch_uses_wheel_that_is_there(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', None)
    members = ['my_data/a.txt', 'my_data/sub/b.txt']
    assert fetch(tmp_path, wheel[1], *members) == 0
    found = {p.name: p.read_text() for p in (tmp_path / 'out').iterdir()}
    assert found == {'a.txt': 'aaa', 'b.txt': 'bbb'}
    wheel[0].unlink()
    assert fetch(tmp_path, wheel[1], *members) == 0


@pytest.mark.parametrize('case', ['checksum', 'member', 'network'])
def test_fetch_errors(tmp_path, wheel, monkeypatch, caplog, case):
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
    assert fetch(tmp_path, digest, *members) == 1
    assert expected in caplog.text
    assert not list((tmp_path / 'out').glob('*'))
    assert [p.name for p in (tmp_path / 'wheels').iterdir()] == (
        [] if case == 'network' else [path.name]
    )


def test_fetch_downloads_and_checks(tmp_path, wheel, monkeypatch):
    content = wheel[0].read_bytes()
    wheel[0].unlink()

    def pip(command, **kwargs):
        assert '--no-deps' in command and command[-1] == 'my-data==1.2'
        folder = Path(command[command.index('-d') + 1])
        (folder / wheel[0].name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', pip)
    assert fetch(tmp_path, '0' * 64, 'my_data/a.txt') == 1
    assert not wheel[0].exists()
    assert fetch(tmp_path, wheel[1], 'my_data/a.txt') == 0
    assert wheel[0].exists()


def test_fetch_wants_a_pinned_version(tmp_path):
    with pytest.raises(utils.ConverterError, match='pin a version'):
        fetcher.fetch_wheel_members('a>=1', '', ['b'], tmp_path, tmp_path)


@pytest.fixture
def photos(tmp_path):
    """Photos of 400x300 pixels with their xml, the first with two trees."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name, lefts in (('p', (1, 290)), ('q', ())):
        Image.new('RGB', (400, 300)).save(folder / f'{name}.png')
        objects = ''.join(
            f'<object><name>Tree</name><bndbox><xmin>{x}</xmin><ymin>1</ymin>'
            f'<xmax>{x + 20}</xmax><ymax>20</ymax></bndbox></object>'
            for x in lefts
        )
        (folder / f'{name}.xml').write_text(f'<a>{objects}</a>')
    return folder


def test_tree_crowns_are_cut_once(tmp_path, photos, monkeypatch):
    splits = {
        'train': (('p',), 0, True, 2, 2),
        'val': (('q',), 0, False, 4, 0),
    }
    monkeypatch.setattr(tree_crowns, 'SPLITS', splits)
    calls = []
    monkeypatch.setattr(
        tree_crowns, 'fetch_wheel_members', lambda *a: calls.append(a)
    )
    assert tree_crowns.main(['--out-dir', str(tmp_path)]) == 0
    train = json.loads((tmp_path / 'annotations' / 'train.json').read_text())
    assert [c['name'] for c in train['categories']] == ['tree']
    assert tree_crowns.main(['--out-dir', str(tmp_path)]) == 0
    assert len(calls) == 1
    next((tmp_path / 'val').iterdir()).unlink()
    assert tree_crowns.main(['--out-dir', str(tmp_path)]) == 0
    assert len(calls) == 2


def test_edited_tree_crowns_are_noticed(tmp_path, photos, monkeypatch):
    splits = {'val': (('p',), 0, False, 4, 3)}
    monkeypatch.setattr(tree_crowns, 'SPLITS', splits)
    with pytest.raises(utils.ConverterError, match='instead of'):
        tree_crowns.make_split(tmp_path, 'val')
