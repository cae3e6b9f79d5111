"""``tools/infer.py`` on images, videos and files that are broken."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.inference import Frame, Source


@pytest.fixture(scope='module')
def infer():
    import infer

    return infer


@pytest.fixture
def model(write_detector, tmp_path, monkeypatch):
    """A config and weights of a tiny detector, in a folder of photos."""
    monkeypatch.chdir(tmp_path)
    write_detector('配置 c.py')
    generator = np.random.default_rng(0)
    for name in ('a', 'b 树'):
        pixels = generator.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        write_bytes(f'photos/{name}.png', cv2.imencode('.png', pixels)[1])
    return ['配置 c.py', 'w.pth']


def write_bytes(name, content):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(content))


def files(root):
    found = (p.relative_to(root) for p in Path(root).rglob('*'))
    return sorted(p.as_posix() for p in found if p.suffix)


def test_folder_with_broken_files(infer, model, capsys):
    write_bytes('photos/empty.jpg', b'')
    write_bytes('photos/text.jpg', b'no image')
    thin = cv2.imencode('.png', np.zeros((1, 3000, 3), np.uint8))[1]
    write_bytes('photos/thin.png', thin)
    argv = [*model, 'photos', '--out-dir', 'out', '--format', 'coco']
    argv += ['--score-thr', '0', '--batch-size', '3', '--device', 'cpu']
    assert infer.main(argv) == 1
    out, err = capsys.readouterr()
    assert re.search(r'^2 images in .* images/s', out, re.M)
    assert '3 inputs failed' in err
    for name in ('empty.jpg', 'text.jpg', 'thin.png'):
        assert f'photos/{name}' in err
    assert files('out') == [
        'pictures/a.jpg',
        'pictures/b 树.jpg',
        'predictions.json',
    ]
    content = json.loads(Path('out/predictions.json').read_text('utf-8'))
    assert len(content['images']) == 2 and content['annotations']
    # Again, from the folder above: results are no inputs.
    argv[2:5] = ['.', '--out-dir', 'out']
    assert infer.main(argv) == 1
    assert '2 images in ' in capsys.readouterr().out


def test_classes_and_threshold(infer, model):
    argv = [*model, 'photos/a.png', '--out-dir', 'out', '--no-pictures']
    argv += ['--format', 'coco', '--device', 'cpu']
    scores = []
    for more in (['--score-thr', '0'], ['--score-thr', '0.5']):
        assert infer.main([*argv, *more, '--classes', '牛', 'cat']) == 0
        content = json.loads(Path('out/predictions.json').read_text('utf-8'))
        names = {c['id']: c['name'] for c in content['categories']}
        found = content['annotations']
        assert {names[a['category_id']] for a in found} <= {'牛', 'cat'}
        scores.append([a['score'] for a in found])
    assert scores[1] == [score for score in scores[0] if score >= 0.5]
    assert files('out') == ['predictions.json']


def test_video_and_tiles(infer, model):
    pytest.importorskip('sahi')
    kind = cv2.VideoWriter_fourcc(*'mp4v')
    writer = cv2.VideoWriter('v.mp4', kind, 5, (96, 64))
    for _ in range(3):
        writer.write(np.full((64, 96, 3), 90, np.uint8))
    writer.release()
    argv = [*model, 'v.mp4', '--out-dir', 'out', '--tile', '64']
    argv += ['--format', 'yolo', '--max-frames', '2', '--device', 'cpu']
    assert infer.main(argv) == 0
    assert files('out') == [
        'classes.txt',
        'labels/v/000000.txt',
        'labels/v/000001.txt',
        'pictures/v.mp4',
    ]


def test_interrupted_runs_keep_what_was_done(infer, model, monkeypatch):
    predict = infer.predict

    def interrupted(predictor, frames):
        if frames[0].source.path.name != 'a.png':
            raise KeyboardInterrupt
        return predict(predictor, frames)

    monkeypatch.setattr(infer, 'predict', interrupted)
    argv = [*model, 'photos', '--out-dir', 'out', '--format', 'csv']
    assert infer.main([*argv, '--device', 'cpu']) == 130
    assert files('out') == ['pictures/a.jpg', 'predictions.csv']


def test_images_that_the_model_cannot_take(infer):
    """Those beside them in a batch are predicted all the same."""

    def predictor(images):
        if any(image.max() > 9 for image in images):
            raise AssertionError('too bright\nfor this model')
        return [image.max() for image in images]

    frames = [
        infer_frame(name, value) for name, value in (('a', 1), ('b', 99))
    ]
    (good, found), (bad, nothing) = infer.predict(predictor, frames)
    assert (good.error, found, nothing) == ('', 1, None)
    assert bad.error == 'b: AssertionError: too bright'


def infer_frame(name, value):
    image = np.full((2, 2, 3), value, np.uint8)
    return Frame(Source(Path(name)), image=image)


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('ran',)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (['no.jpg'], 'no.jpg: there is no such file'),
        (['photos', '--classes', 'bird'], "no class 'bird'"),
        (['photos', '--device', 'xyz'], 'xyz'),
        (['photos', '--overlap', '1', '--tile', '9'], 'overlap'),
        (['other weights', 'photos'], 'does not fit the model'),
        (['code', 'photos'], '--trust'),
        (['no config', 'photos'], 'there is no config'),
    ],
)
def test_mistakes_of_users(infer, model, capsys, change, expected):
    config, weights = model
    if change[0] == 'other weights':
        torch.save(dict(state_dict=dict(a=torch.zeros(1))), weights)
        change = change[1:]
    elif change[0] == 'code':
        torch.save(dict(state_dict={}, meta=Code()), weights)
        change = change[1:]
    elif change[0] == 'no config':
        config, change = 'no.py', change[1:]
    with pytest.raises(SystemExit) as error:
        infer.main([config, weights, *change, '--out-dir', 'out'])
    assert error.value.code == 2
    assert expected in capsys.readouterr().err
    assert not Path('out').exists() and not Path('ran').exists()


def test_wrong_options(infer):
    for wrong in (['--tile', '0'], ['--batch-size', '0'], ['--no-pictures']):
        with pytest.raises(SystemExit) as error:
            infer.parse_args(['c', 'w', 'i', '--out-dir', 'o', *wrong])
        assert error.value.code == 2
