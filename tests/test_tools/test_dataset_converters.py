import hashlib
import json
import subprocess
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
