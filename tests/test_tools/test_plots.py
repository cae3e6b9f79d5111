"""``plot_training.py`` and ``draw_predictions.py``."""

import json
import os
import pickle
import re

import cv2
import draw_predictions as draw
import mmcv
import numpy as np
import plot_training as plot
import pytest
import torch

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.visualization.painter import HEADER, Painter


def write_run(root, name, steps, ap=None, seconds=6.0):
    """Write a log: a loss at each step and an evaluation after each."""
    folder = root / name / 'vis_data'
    folder.mkdir(parents=True)
    lines = []
    for step in steps:
        losses = {'stage0.loss_cls': 1.0, 'stage1.loss_cls': 2.0}
        losses.update({'stage0.loss_iou': 0.5, 'loss': 3.5, 'lr': 0.1})
        record = dict(losses, time=seconds, step=step, epoch=step // 10)
        lines.append(json.dumps(record))
        if ap is not None:
            metrics = {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': 2 * ap}
            metrics.update({'coco/bbox_mAP_l': -1.0, 'step': step // 10})
            lines.append(json.dumps(metrics))
    (folder / 'scalars.json').write_text('\n'.join(lines) + '\n{"los')


def test_history_of_a_resumed_training(tmp_path):
    write_run(tmp_path, '20260101_000000', [10, 20, 30], ap=0.1)
    write_run(tmp_path, '20260101_010000', [30, 40], ap=0.2)
    folder = tmp_path / '20260101_020000' / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('{"coco/bbox_mAP": 0.9, "step": 0}')
    history = plot.read_history(tmp_path)
    assert [r['step'] for r in history.train] == [10, 20, 30, 40]
    assert [r['minutes'] for r in history.train] == pytest.approx([1, 2, 3, 4])
    assert plot.collect_metrics(history.val) == {
        'AP': [(10, 0.1), (20, 0.1), (30, 0.2), (40, 0.2)],
        'AP50': [(10, 0.2), (20, 0.2), (30, 0.4), (40, 0.4)],
    }


def test_history_of_a_repeated_training(tmp_path):
    write_run(tmp_path, '20260101_000000', [10, 20, 30], ap=0.1)
    write_run(tmp_path, '20260101_010000', [10, 20], ap=0.2)
    history = plot.read_history(tmp_path)
    assert [r['step'] for r in history.train] == [10, 20]
    assert [v['coco/bbox_mAP'] for v in history.val] == [0.2, 0.2]


def test_losses_are_summed_over_stages(tmp_path):
    write_run(tmp_path, 'run', [10, 20])
    losses = plot.collect_losses(plot.read_history(tmp_path).train)
    found = {name: values.tolist() for name, values in losses.items()}
    assert found == {
        'loss': [3.5, 3.5],
        'loss_cls': [3.0, 3.0],
        'loss_iou': [0.5, 0.5],
    }


def test_smoothing_keeps_lines():
    line = np.arange(20.0)
    np.testing.assert_allclose(plot.smooth(line, 4), line)
    assert plot.smooth(np.array([0.0, 3.0, 0.0]), 5).tolist() == [0, 1, 0]


@pytest.mark.parametrize('ap', [None, 0.0, 0.3])
def test_plot_is_written(tmp_path, ap):
    write_run(tmp_path, 'run', range(10, 100, 10), ap=ap)
    assert plot.main([str(tmp_path)]) == 0
    picture = cv2.imread(str(tmp_path / 'training.png'))
    assert picture.shape[1] > 1000 and picture.std() > 5


def test_plot_without_log(tmp_path, caplog):
    assert plot.main([str(tmp_path)]) == 1
    assert 'scalars.json' in caplog.text


def make_sample(boxes, scores, labels=None, truth=None):
    truth = [[0, 0, 10, 10], [20, 20, 30, 30]] if truth is None else truth
    return draw.Sample(
        path='',
        gt_boxes=np.array(truth, float).reshape(-1, 4),
        gt_labels=np.arange(len(truth)),
        boxes=np.array(boxes, float).reshape(-1, 4),
        scores=np.array(scores, float),
        labels=np.array(labels or [0] * len(boxes), int),
    )


def test_match_is_one_to_one_and_by_class():
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]]
    boxes += [[21, 20, 30, 30], [5, 0, 15, 10]]
    sample = make_sample(boxes, [5, 4, 3, 2, 1], [0, 0, 0, 1, 0])
    assert sample.match().tolist() == [0, -1, -1, 1, -1]


def test_match_without_boxes():
    assert make_sample([], []).match().tolist() == []
    sample = make_sample([[0, 0, 9, 9]], [1], truth=[])
    assert sample.match().tolist() == [-1]


def test_best_threshold():
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]]
    sample = make_sample(boxes, [0.9, 0.6, 0.2], [0, 1, 0])
    assert draw.best_threshold([sample]) == 0.6
    nothing = make_sample(boxes[2:], [0.9])
    assert draw.best_threshold([nothing]) == 0.3


def read(path):
    return mmcv.imread(str(path), channel_order='rgb')


def has_color(picture, color):
    return (np.abs(picture.astype(int) - color).sum(-1) < 12).any()


@pytest.fixture
def coco_set(tmp_path):
    """Two images with one box each, a config and their predictions."""
    for name in ('a', 'b'):
        cv2.imwrite(
            str(tmp_path / f'{name}.png'), np.full((64, 48, 3), 90, np.uint8)
        )
    images = [
        dict(id=i, file_name=f'{n}.png', width=48, height=64)
        for i, n in ((1, 'a'), (2, 'b'))
    ]
    annotations = [
        dict(id=i, image_id=i, category_id=1, area=400, iscrowd=0)
        | dict(bbox=[10, 20, 20, 20])
        for i in (1, 2)
    ]
    categories = [dict(id=1, name='thing')]
    content = dict(
        images=images, annotations=annotations, categories=categories
    )
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    config = tmp_path / 'config.py'
    config.write_text(
        "test_dataloader = dict(dataset=dict(type='CocoDataset', "
        f"data_root='{tmp_path}', ann_file='ann.json', test_mode=True, "
        "data_prefix=dict(img=''), metainfo=dict(classes=('thing',)), "
        'pipeline=[]))\n'
    )
    boxes = {1: [[10.0, 20, 30, 40]], 2: [[0.0, 0, 9, 9]]}
    results = [
        dict(
            img_id=i,
            pred_instances=dict(
                bboxes=torch.tensor(box),
                scores=torch.tensor([0.8]),
                labels=torch.tensor([0]),
            ),
        )
        for i, box in boxes.items()
    ]
    pkl = tmp_path / 'predictions.pkl'
    pkl.write_bytes(pickle.dumps(results))
    return config, pkl, results


def test_pictures_from_a_pickle(coco_set, tmp_path):
    config, pkl, _ = coco_set
    out = tmp_path / 'pictures'
    code = draw.main([str(config), '--pkl', str(pkl), '--out-dir', str(out)])
    assert code == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ['a.png', 'b.png', 'contact_sheet.png']
    a, b = (read(out / f'{n}.png') for n in 'ab')
    middle = a.shape[1] // 2
    for picture, hit, miss in (
        (a, draw.GREEN, draw.MAGENTA),
        (b, draw.MAGENTA, draw.GREEN),
    ):
        below = picture[HEADER:]
        assert has_color(below[:, :middle], draw.YELLOW)
        assert has_color(below[:, middle:], hit)
        assert not has_color(below[:, middle:], miss)
        assert not has_color(below[:, :middle], hit)
        # The header counts right ones and wrong ones, in their colours.
        assert has_color(picture[:HEADER, middle:], draw.GREEN)
        assert has_color(picture[:HEADER, middle:], draw.MAGENTA)
    # The line of a missed box is interrupted.
    yellow = [
        (np.abs(p[HEADER:].astype(int) - draw.YELLOW).sum(-1) < 12).sum()
        for p in (a, b)
    ]
    assert yellow[1] < 0.9 * yellow[0]


def test_pictures_by_threshold_and_number(coco_set, tmp_path):
    config, pkl, _ = coco_set
    out = tmp_path / 'pictures'
    options = ['--score-thr', '0.9', '--num', '1', '--out-dir', str(out)]
    assert draw.main([str(config), '--pkl', str(pkl), *options]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        'a.png',
        'contact_sheet.png',
    ]
    assert not has_color(read(out / 'a.png')[HEADER:], draw.GREEN)


def test_ground_truth_alone(coco_set, tmp_path):
    config = coco_set[0]
    text = config.read_text().replace('test_dataloader', 'train_dataloader')
    config.write_text(text)
    out = tmp_path / 'pictures'
    options = ['--truth', '--split', 'train', '--out-dir', str(out)]
    assert draw.main([str(config), *options]) == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == ['a.png', 'b.png', 'contact_sheet.png']
    picture = read(out / 'a.png')
    assert picture.shape == (720 + HEADER, 540, 3)
    below = picture[HEADER:].astype(int)
    (color,) = Painter(['thing']).colors
    rows, columns = (np.abs(below - color).sum(-1) < 30).nonzero()
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    expected = np.array([10, 20, 30, 40]) * 720 / 64
    np.testing.assert_allclose(found, expected, atol=2)


def test_classes_differ_in_colour():
    colors = np.array(Painter([str(i) for i in range(10)]).colors)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distances[~np.eye(10, dtype=bool)].min() > 30


def test_images_of_the_same_name(coco_set, tmp_path):
    """A thin one among them, and one with the name of the sheet."""
    config = coco_set[0]
    content = json.loads((tmp_path / 'ann.json').read_text())
    files = ['north/0001.png', 'south/0001.png', 'x/contact_sheet.jpg']
    content['images'] = [
        dict(id=i, file_name=name, width=3000, height=1)
        for i, name in enumerate(files)
    ]
    content['annotations'] = []
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    for name in files:
        path = str(tmp_path / name)
        mmcv.imwrite(np.full((1, 3000, 3), 90, np.uint8), path)
    out = tmp_path / 'out'
    assert draw.main([str(config), '--truth', '--out-dir', str(out)]) == 0
    found = {p.relative_to(out).as_posix() for p in out.rglob('*.png')}
    assert found == {
        'north/0001.png',
        'south/0001.png',
        'contact_sheet.jpg.png',
        'contact_sheet.png',
    }


def test_data_is_checked(coco_set, tmp_path, caplog):
    """Names would be wrong, and predictions of two files be mixed up."""
    config, pkl, _ = coco_set
    path = tmp_path / 'ann.json'
    content = json.loads(path.read_text())
    content['categories'].insert(0, dict(id=2, name='other'))
    path.write_text(json.dumps(content))
    text = config.read_text()
    config.write_text(text.replace("('thing',)", "('thing', 'other')"))
    argv = [str(config), '--truth', '--out-dir', str(tmp_path / 'out')]
    assert draw.main(argv) == 1
    assert 'the classes are in another order' in caplog.text
    assert not (tmp_path / 'out').exists()
    assert draw.main([*argv, '--no-checks']) == 0
    config.write_text(
        text + 'one = test_dataloader["dataset"]\n'
        "test_dataloader = dict(dataset=dict(type='ConcatDataset', "
        'datasets=[one, one]))\n'
    )
    assert draw.main(argv) == 0
    argv = [str(config), '--pkl', str(pkl), '--out-dir', str(tmp_path / 'no')]
    assert draw.main(argv) == 1
    assert 'several files have the same ids' in caplog.text


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('form', ['--pkl', 'checkpoint'])
def test_code_needs_trust(coco_set, tmp_path, caplog, form):
    config, pkl, results = coco_set
    mark = tmp_path / 'ran'
    data = dict(state_dict={}, meta=Code(str(mark)))
    if form == '--pkl':
        results[0]['extra'], data = Code(str(mark)), results
    pkl.write_bytes(pickle.dumps(data, protocol=2))
    with config.open('a') as file:
        file.write("model = dict(type='lors_plugin.AdaMixer')\n")
    given = ['--pkl', str(pkl)] if form == '--pkl' else [str(pkl)]
    argv = [str(config), *given, '--out-dir', str(tmp_path / 'out')]
    assert draw.main(argv) == 1
    assert not mark.exists() and not (tmp_path / 'out').exists()
    last = caplog.text.splitlines()[-1]
    assert 'predictions.pkl' in last and '--trust' in last
    if form == '--pkl':
        assert draw.main([*argv, '--trust']) == 0
        assert mark.exists()


STRANGE = [
    None,
    [dict(img_id=1, pred_instances=None)],
    [dict(pred_score=1)],
    [dict(img_id=1, pred_instances=dict(bboxes=1, scores=2, labels=3))],
    [
        dict(
            img_id=1,
            pred_instances=dict(
                bboxes=torch.zeros(1, 4),
                scores=torch.zeros(2),
                labels=torch.zeros(1),
            ),
        )
    ],
]


@pytest.mark.parametrize('content', STRANGE)
def test_pickles_without_detections(coco_set, tmp_path, caplog, content):
    config, pkl, _ = coco_set
    pkl.write_bytes(pickle.dumps(content))
    argv = [str(config), '--pkl', str(pkl), '--out-dir', str(tmp_path / 'o')]
    assert draw.main(argv) == 1
    assert 'predictions.pkl does not hold detections' in caplog.text


@pytest.mark.parametrize(
    ('case', 'expected'),
    [
        ('other data', 'lacks 1 images'),
        ('no file', 'predictions.pkl'),
        ('no image', r'cannot read image .*a\.png'),
        ('empty image', r'cannot read image .*a\.png'),
    ],
)
def test_picture_errors(coco_set, tmp_path, caplog, case, expected):
    config, pkl, results = coco_set
    if case == 'other data':
        pkl.write_bytes(pickle.dumps(results[:1]))
    elif case == 'no file':
        pkl.unlink()
    elif case == 'no image':
        (tmp_path / 'a.png').unlink()
    else:
        (tmp_path / 'a.png').write_bytes(b'')
    out = tmp_path / 'pictures'
    code = draw.main([str(config), '--pkl', str(pkl), '--out-dir', str(out)])
    assert code == 1 and re.search(expected, caplog.text)
    assert not out.exists()


def test_a_picture_that_the_pipeline_cannot_take_is_named(
    write_detector, tmp_path, monkeypatch, caplog
):
    """A row of pixels that keeps its ratio has no height when resized."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('thin.png', np.zeros((1, 3000, 3), np.uint8))
    image = dict(id=1, file_name='thin.png', width=3000, height=1)
    categories = [
        dict(id=i, name=n) for i, n in enumerate(['cat', 'dog', '牛'])
    ]
    content = dict(images=[image], annotations=[], categories=categories)
    (tmp_path / 'a.json').write_text(json.dumps(content))
    write_detector(
        'a.py', ann_file='a.json', data_prefix=dict(img=''), test_mode=True
    )
    assert draw.main(['a.py', 'w.pth', '--out-dir', 'out']) == 1
    assert (
        'thin.png: the test pipeline cannot prepare an image of 3000 x 1'
        in (caplog.text)
    )


def test_checkpoint_or_pickle():
    for arguments in (
        [],
        ['w.pth', '--pkl', 'p.pkl'],
        ['w.pth', '--truth'],
        ['w.pth', '--split', 'train'],
    ):
        with pytest.raises(SystemExit) as error:
            draw.parse_args(['c.py', *arguments, '--out-dir', 'o'])
        assert error.value.code == 2
