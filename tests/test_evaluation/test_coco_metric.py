"""MMDetection's metric with either evaluator."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from pycocotools.cocoeval import COCOeval

from lors_plugin.evaluation import CocoMetric, FasterCOCOeval, coco_metric

CLASSES = ('ant', 'bee', 'cow')


@pytest.fixture
def predictions():
    """Data samples as a detector gives them; no boxes in the last image."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(6):
        truth = rng.integers(0, 3, rng.integers(1, 6)) if index < 5 else []
        boxes = [rng.uniform(0, 60, 4) for _ in truth]
        for box in boxes:
            box[2:] = box[:2] + 8 + box[2:]
        found = np.array(boxes + boxes).reshape(-1, 4)
        found = found + rng.normal(0, 3, found.shape)
        labels = np.array([*truth, *rng.integers(0, 3, len(truth))])
        samples.append(
            dict(
                img_id=index,
                ori_shape=(150, 140),
                instances=[
                    dict(bbox=b.tolist(), bbox_label=int(n), ignore_flag=0)
                    for b, n in zip(boxes, truth)
                ],
                pred_instances=dict(
                    bboxes=torch.tensor(found),
                    scores=torch.tensor(rng.random(len(found))),
                    labels=torch.tensor(labels, dtype=torch.long),
                ),
            )
        )
    return samples


@pytest.fixture
def ann_file(predictions, tmp_path):
    """The same ground truth as a file, with a crowd."""
    annotations = []
    for sample in predictions:
        for instance in sample['instances']:
            x1, y1, x2, y2 = instance['bbox']
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=sample['img_id'],
                    category_id=10 * instance['bbox_label'],
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(len(annotations) == 3),
                )
            )
    content = dict(
        images=[
            dict(id=s['img_id'], width=140, height=150) for s in predictions
        ],
        annotations=annotations,
        categories=[
            dict(id=10 * i, name=name) for i, name in enumerate(CLASSES)
        ],
    )
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(content))
    return str(path)


def evaluate(samples, type='lors_plugin.CocoMetric', **options):
    """Run a metric as a test loop does, from its config."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluator = Evaluator(dict(type=type, **options))
    evaluator.dataset_meta = dict(classes=CLASSES)
    evaluator.process(samples)
    return evaluator.evaluate(len(samples))


@pytest.fixture
def used(monkeypatch):
    """Who was asked to evaluate."""
    names = []
    for kind in (FasterCOCOeval, COCOeval):
        monkeypatch.setattr(kind, 'evaluate', spy(kind.evaluate, names, kind))
    return names


def spy(method, names, kind):
    def evaluate(self):
        names.append(kind.__name__)
        return method(self)

    return evaluate


@pytest.mark.parametrize(
    'options',
    [
        dict(metric='bbox', classwise=True),
        dict(metric=['bbox', 'proposal'], proposal_nums=(1, 2, 3)),
        dict(
            metric='bbox',
            metric_items=['mAP_75', 'AR_m@1000'],
            iou_thrs=np.array([0.5, 0.6, 0.75]),
        ),
    ],
    ids=['classwise', 'proposals', 'items'],
)
@pytest.mark.parametrize('with_file', [True, False], ids=['file', 'samples'])
def test_numbers_of_the_host(options, with_file, predictions, ann_file, used):
    if with_file:
        options = dict(options, ann_file=ann_file)
    want = evaluate(predictions, type='CocoMetric', **options)
    assert set(used) == {'COCOeval'}
    used.clear()
    have = evaluate(predictions, backend='faster', **options)
    assert set(used) == {'FasterCOCOeval'}
    assert have == want
    assert any(0 < value < 1 for value in want.values())


def test_no_detections_at_all(predictions, ann_file):
    for sample in predictions:
        sample['pred_instances'] = dict(
            bboxes=torch.zeros(0, 4),
            scores=torch.zeros(0),
            labels=torch.zeros(0, dtype=torch.long),
        )
    want = evaluate(predictions, type='CocoMetric', ann_file=ann_file)
    assert evaluate(predictions, ann_file=ann_file) == want == {}


@pytest.mark.parametrize(
    ('backend', 'installed', 'kind'),
    [
        ('auto', True, 'FasterCOCOeval'),
        ('auto', False, 'COCOeval'),
        ('pycocotools', True, 'COCOeval'),
        ('faster', True, 'FasterCOCOeval'),
    ],
)
def test_who_counts(
    backend, installed, kind, predictions, ann_file, used, monkeypatch
):
    monkeypatch.setattr(coco_metric, 'is_installed', lambda: installed)
    evaluate(predictions, ann_file=ann_file, backend=backend)
    assert used == [kind]


def test_faster_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(coco_metric, 'is_installed', lambda: False)
    with pytest.raises(ImportError, match='pip install faster-coco-eval'):
        CocoMetric(backend='faster')
    CocoMetric(backend='auto')


IDS = {
    'annotations from 0': dict(annotations=lambda i: i - 1),
    'annotations below 0': dict(annotations=lambda i: -i),
    'annotations of 64 bits': dict(annotations=lambda i: 2**63 - 3 + i),
    'annotations of 128 bits': dict(annotations=lambda i: 2**127 + i),
    'annotations of texts': dict(annotations=lambda i: f'{i:032x}'),
    'annotations of one id': dict(annotations=lambda i: 7),
    'images from -3': dict(images=lambda i: i - 3),
    'images above 2**53': dict(images=lambda i: 2**60 + i),
    'images of 128 bits, one negative': dict(
        images=lambda i: 2**127 + i if i else -1
    ),
    'images of texts': dict(images=lambda i: f'{i}.png'),
    'images of numbers and texts': dict(images=lambda i: str(i) if i else i),
    'images of fractions': dict(images=lambda i: i / 4),
    'categories descending': dict(categories=lambda i: -i),
    'categories of texts': dict(categories=lambda i: f'c{20 - i}'),
    'categories above 2**53': dict(categories=lambda i: 2**60 - i),
}


def with_ids(content, samples, annotations=int, images=int, categories=int):
    """The same truth, as samples see it, with other ids."""
    content = copy.deepcopy(content)
    for entry in content['annotations']:
        entry['id'] = annotations(entry['id'])
        entry['image_id'] = images(entry['image_id'])
        entry['category_id'] = categories(entry['category_id'])
    for entry in content['images']:
        entry['id'] = images(entry['id'])
    for entry in content['categories']:
        entry['id'] = categories(entry['id'])
    return content, [dict(s, img_id=images(s['img_id'])) for s in samples]


@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
@pytest.mark.parametrize('ids', IDS.values(), ids=IDS)
def test_any_ids(ids, backend, predictions, ann_file, tmp_path):
    """They change no number, nor which class has which."""
    options = dict(metric=['bbox', 'proposal'], classwise=True)
    want = evaluate(predictions, ann_file=ann_file, **options)
    content = json.loads(Path(ann_file).read_text())
    content, samples = with_ids(content, predictions, **ids)
    path = tmp_path / 'ids.json'
    path.write_text(json.dumps(content))
    have = evaluate(samples, ann_file=str(path), backend=backend, **options)
    assert have == want
    aps = [want[f'coco/{name}_precision'] for name in CLASSES]
    assert len({*aps, 0, 1}) == 5


@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
@pytest.mark.parametrize('fault', ['group', 'spread', 'order', 'no crowds'])
def test_odd_files(fault, backend, predictions, ann_file, tmp_path, caplog):
    """Names count, however often and in which order they are there."""
    want = evaluate(predictions, ann_file=ann_file, classwise=True)
    content = json.loads(Path(ann_file).read_text())
    categories = content['categories']
    if fault == 'group':  # a group of that name, without annotations
        categories[:0] = [dict(id=99, name='ant'), dict(id=98, name='bugs')]
    elif fault == 'spread':
        categories.append(dict(id=99, name='ant'))
        for entry in content['annotations'][::2]:
            if entry['category_id'] == 0:
                entry['category_id'] = 99
    elif fault == 'order':
        categories.reverse()
    else:
        for entry in content['annotations']:
            if not entry['iscrowd']:
                del entry['iscrowd'], entry['area']
    path = tmp_path / 'odd.json'
    path.write_text(json.dumps(content))
    have = evaluate(
        predictions, ann_file=str(path), classwise=True, backend=backend
    )
    assert have == want


def test_order_of_the_categories_is_told(ann_file, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        coco_metric, 'print_log', lambda text, **kw: lines.append((text, kw))
    )
    metric = CocoMetric(ann_file=ann_file)
    metric.dataset_meta = dict(classes=CLASSES)
    metric.dataset_meta = None
    assert not lines
    metric.dataset_meta = dict(classes=('bee', 'ant'))
    ((text, options),) = lines
    assert 'classes of the data set are in another order' in text
    assert options['level'] == logging.WARNING


def test_classes_that_do_not_fit_the_file(ann_file):
    """Told when the loop is built, before the first step."""
    metric = CocoMetric(ann_file=ann_file)
    with pytest.raises(ValueError, match='lacks 1 of 2 classes.*: elk'):
        metric.dataset_meta = dict(classes=('ant', 'elk'))
    with pytest.raises(ValueError, match='a class name twice: ant'):
        metric.dataset_meta = dict(classes=('ant', 'bee', 'ant'))


@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
def test_images_of_several_data_sets(backend, predictions):
    """Two files of one ConcatDataset may have the same ids."""
    unlike = [
        dict(s, img_id=n) for n, s in enumerate(predictions + predictions[:3])
    ]
    alike = predictions + predictions[:3]
    want = evaluate(unlike, type='CocoMetric', metric='bbox')
    assert evaluate(alike, backend=backend) == want
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluator = Evaluator(dict(type='lors_plugin.CocoMetric'))
    evaluator.dataset_meta = dict(classes=CLASSES)
    for _ in range(2):  # as in each epoch
        evaluator.process(alike)
        assert evaluator.evaluate(len(alike)) == want


def test_several_processes(predictions, ann_file):
    """MMDetection's ``use_mp_eval`` gives the same, with any ids."""
    want = evaluate(predictions, ann_file=ann_file)
    have = evaluate(predictions, ann_file=ann_file, use_mp_eval=True)
    assert have == want


def test_predictions_in_a_file_have_the_ids_of_the_annotations(
    predictions, ann_file, tmp_path
):
    content = json.loads(Path(ann_file).read_text())
    content, samples = with_ids(content, predictions, images=lambda i: -i - 5)
    path = tmp_path / 'ids.json'
    path.write_text(json.dumps(content))
    evaluate(
        samples, ann_file=str(path), outfile_prefix=str(tmp_path / 'found')
    )
    found = json.loads((tmp_path / 'found.bbox.json').read_text())
    assert {entry['image_id'] for entry in found} == set(range(-9, -4))
    assert {entry['category_id'] for entry in found} == {0, 10, 20}


def test_mistakes_in_the_config():
    with pytest.raises(ValueError, match="evaluator.backend='fast'"):
        CocoMetric(backend='fast')
    with pytest.raises(ValueError, match='use_mp_eval'):
        CocoMetric(backend='faster', use_mp_eval=True)


def test_host_stays_as_it_is(predictions, ann_file, used):
    """Whatever ran before, MMDetection's own metric runs pycocotools."""
    evaluate(predictions, ann_file=ann_file, backend='faster')
    used.clear()
    evaluate(predictions, type='CocoMetric', ann_file=ann_file)
    assert used == ['COCOeval']


def test_log_says_who_counts(predictions, ann_file, monkeypatch):
    lines = []
    monkeypatch.setattr(
        coco_metric, 'print_log', lambda text, **kw: lines.append((text, kw))
    )
    evaluate(predictions, ann_file=ann_file, backend='faster')
    ((text, options),) = lines
    assert text == 'COCO evaluation by faster-coco-eval'
    assert options['level'] == logging.INFO
