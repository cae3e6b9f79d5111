"""What the quick start reaches is not there before its training."""

import json

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

CONFIG = 'lors-adamixer_mobilenetv2_quickstart_tree-crowns.py'
NUM_TILES = 10


@pytest.fixture
def crowns():
    """Tiles full of squares of the size of crowns, (n, 4) each."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        noise = torch.rand(*shape, generator=generator)
        return low + (high - low) * noise

    tiles = []
    for _ in range(NUM_TILES):
        centres, half = uniform(20, 236, 15, 2), uniform(10, 33, 15, 1)
        tiles.append(torch.cat([centres - half, centres + half], 1))
    return tiles


@pytest.fixture
def evaluate(crowns, tmp_path):
    """COCO AP and AP50 of data samples with predictions."""
    from mmdet.evaluation import CocoMetric

    annotations = [
        dict(
            image_id=image,
            category_id=0,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0,
        )
        for image, boxes in enumerate(crowns)
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    for number, annotation in enumerate(annotations):
        annotation['id'] = number + 1
    coco = dict(
        images=[dict(id=i, height=256, width=256) for i in range(NUM_TILES)],
        categories=[dict(id=0, name='tree')],
        annotations=annotations,
    )
    ann_file = tmp_path / 'annotations.json'
    ann_file.write_text(json.dumps(coco))

    def run(results):
        metric = CocoMetric(str(ann_file), metric='bbox')
        metric.dataset_meta = dict(classes=('tree',))
        metric.process({}, [result.to_dict() for result in results])
        scores = metric.evaluate(NUM_TILES)
        return scores['coco/bbox_mAP'], scores['coco/bbox_mAP_50']

    return run


def samples():
    size = dict(img_shape=(256, 256), ori_shape=(256, 256))
    return [
        DetDataSample(metainfo=dict(img_id=i, **size))
        for i in range(NUM_TILES)
    ]


def test_untrained_quickstart_finds_next_to_nothing(evaluate, root, build):
    """Its queries start as cells of about the right size, so not quite 0."""
    cfg = Config.fromfile(root / 'configs' / 'lors_adamixer' / CONFIG)
    cfg.model.backbone.init_cfg = None
    detector = build(cfg.model).eval()
    detector.init_weights()
    with torch.no_grad():
        results = detector.predict(
            torch.randn(NUM_TILES, 3, 256, 256), samples()
        )
    ap, ap50 = evaluate(results)
    assert ap < 0.02
    assert ap50 < 0.06


def test_right_boxes_are_found(crowns, evaluate):
    """The bar above is real: boxes drawn by hand reach 1."""
    results = samples()
    for sample, boxes in zip(results, crowns):
        sample.pred_instances = InstanceData(
            bboxes=boxes,
            scores=torch.ones(len(boxes)),
            labels=torch.zeros(len(boxes), dtype=torch.long),
        )
    ap, ap50 = evaluate(results)
    assert ap > 0.99
    assert ap50 > 0.99
