"""MMDetection's metric with either evaluator."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope

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
    for kind in (FasterCOCOeval, coco_metric._HOST_EVALUATOR):
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


def test_ids_that_only_pycocotools_knows(
    predictions, ann_file, used, caplog, tmp_path
):
    content = json.loads(Path(ann_file).read_text())
    for entry in content['images']:
        entry['id'] = str(entry['id'])
    for entry in content['annotations']:
        entry['image_id'] = str(entry['image_id'])
    path = tmp_path / 'text_ids.json'
    path.write_text(json.dumps(content))
    for sample in predictions:
        sample['img_id'] = str(sample['img_id'])
    evaluate(predictions, ann_file=str(path))
    assert used == ['COCOeval']
    with pytest.raises(TypeError, match="image id '0' is no whole number"):
        evaluate(predictions, ann_file=str(path), backend='faster')


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
