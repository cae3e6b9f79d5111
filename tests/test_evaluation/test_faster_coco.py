"""The fast evaluation gives the numbers of pycocotools."""

import json
import re

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lors_plugin.evaluation import FasterCOCOeval

SIDES = (12, 60, 180)  # small, medium, large


def make_dataset(seed, num_images=12, num_classes=5, first_id=1):
    """Ground truth and detections with everything that may go wrong.

    Crowds, images without boxes or without detections, a class without
    ground truth, one without detections, equal scores, more detections
    than are looked at.
    """
    rng = np.random.default_rng(seed)
    images = [dict(id=3 * i, width=400, height=400) for i in range(num_images)]
    annotations, detections = [], []
    for index, image in enumerate(images):
        for _ in range(rng.integers(0, 7) if index else 0):
            side = rng.choice(SIDES) * rng.uniform(0.6, 1.6, 2)
            x, y = rng.uniform(0, 400 - side)
            box = [x, y, *side]
            label = int(rng.integers(1, num_classes))
            annotations.append(
                dict(
                    id=len(annotations) + first_id,
                    image_id=image['id'],
                    category_id=label,
                    bbox=box,
                    area=float(np.prod(side) * rng.uniform(0.5, 1)),
                    iscrowd=int(rng.random() < 0.15),
                    segmentation=[polygon(box)],
                )
            )
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, 0.12, 4) * side[0]
                moved[2:] = moved[2:].clip(2)
                wrong = rng.random() < 0.2
                detections.append(
                    detection(
                        image['id'],
                        int(rng.integers(1, num_classes)) if wrong else label,
                        moved.tolist(),
                        round(float(rng.random()), 1),
                    )
                )
        for _ in range(rng.integers(0, 9) if index != 1 else 0):
            box = [*rng.uniform(0, 300, 2), *rng.uniform(4, 99, 2)]
            label = int(rng.choice([0, 1, 2, 3]))
            detections.append(
                detection(image['id'], label, list(box), float(rng.random()))
            )
    detections = [d for d in detections if d['category_id'] != 4]
    categories = [dict(id=i, name=f'c{i}') for i in range(num_classes)]
    dataset = dict(
        images=images, annotations=annotations, categories=categories
    )
    return dataset, detections


def polygon(box):
    x, y, w, h = box
    return [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]


def detection(image, label, box, score):
    return dict(image_id=image, category_id=label, bbox=box, score=score)


def coco_of(dataset):
    coco = COCO()
    coco.dataset = json.loads(json.dumps(dataset))
    coco.createIndex()
    return coco


def run(kind, dataset, detections, iou_type='bbox', **params):
    """Evaluate, on copies since an evaluation writes into them."""
    truth = coco_of(dataset)
    evaluator = kind(
        truth, truth.loadRes(json.loads(json.dumps(detections))), iou_type
    )
    for name, value in params.items():
        setattr(evaluator.params, name, value)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def assert_same(dataset, detections, **options):
    """Every precision, recall, score and summary, to 1e-6."""
    want = run(COCOeval, dataset, detections, **options)
    have = run(FasterCOCOeval, dataset, detections, **options)
    for key in ('precision', 'recall', 'scores'):
        np.testing.assert_allclose(
            have.eval[key], want.eval[key], rtol=0, atol=1e-6, err_msg=key
        )
    assert have.eval['counts'] == want.eval['counts']
    np.testing.assert_allclose(have.stats, want.stats, rtol=0, atol=1e-6)
    return want


OPTIONS = {
    'coco': dict(),
    'of_mmdet': dict(maxDets=[100, 300, 1000]),
    'few_detections': dict(maxDets=[1, 2, 3]),
    'no_classes': dict(useCats=0),
    'some_classes': dict(catIds=[3, 1]),
    'no_classes_of_some': dict(useCats=0, catIds=[2, 1]),
    'some_images': dict(imgIds=[9, 0, 3, 27]),
    'one_threshold': dict(iouThrs=np.array([0.5])),
    'own_thresholds': dict(iouThrs=np.linspace(0.3, 0.7, 5)),
    'own_areas': dict(
        areaRng=[[0, 1e10], [0, 900], [900, 5000], [5000, 1e10]]
    ),
}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_boxes(options, seed):
    dataset, detections = make_dataset(seed)
    result = assert_same(dataset, detections, **options)
    assert any(a['iscrowd'] for a in dataset['annotations'])
    assert 0 < result.eval['recall'].max() <= 1
    if not {'catIds', 'useCats'} & set(options):  # class 0 has no boxes
        assert (result.eval['recall'] == -1).any()


def test_masks():
    dataset, detections = make_dataset(5)
    for entry in detections:
        outline = [polygon(entry.pop('bbox'))]
        (mask,) = mask_utils.frPyObjects(outline, 400, 400)
        mask['counts'] = mask['counts'].decode()
        entry['segmentation'] = mask
    result = assert_same(dataset, detections, iou_type='segm')
    assert result.stats[0] > 0


def test_without_large_objects():
    """What is not there is -1, in pycocotools' own words."""
    dataset, detections = make_dataset(1)
    for annotation in dataset['annotations']:
        annotation['area'] = 50.0
    result = assert_same(dataset, detections)
    assert result.stats[4] == result.stats[5] == -1


def test_no_ground_truth():
    dataset, detections = make_dataset(2)
    dataset['annotations'] = []
    result = assert_same(dataset, detections)
    assert set(result.stats) == {-1}


def test_one_detection():
    dataset, detections = make_dataset(2)
    assert_same(dataset, detections[:1])


def test_annotations_from_zero():
    """pycocotools takes a match with the annotation 0 for none."""
    dataset, detections = make_dataset(3, first_id=0)
    assert_same(dataset, detections)


@pytest.mark.parametrize(
    ('part', 'number'),
    [('annotations', 'a'), ('images', 2**53), ('annotations', -1)],
)
def test_ids_that_it_cannot_take(part, number):
    """It would match nothing; ``CocoMetric`` numbers them anew."""
    dataset, detections = make_dataset(0)
    detections = [d for d in detections if d['image_id']]
    dataset[part][0]['id'] = number
    with pytest.raises(ValueError, match=re.escape(f'the id {number!r}')):
        run(FasterCOCOeval, dataset, detections)


def test_other_parameters_afterwards_are_refused():
    evaluator = run(FasterCOCOeval, *make_dataset(0))
    with pytest.raises(ValueError, match='pycocotools'):
        evaluator.accumulate(COCOeval().params)
