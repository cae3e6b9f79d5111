"""What the data pipelines of every config make of an image."""

import random

import mmcv
import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

from lors_plugin.evaluation import CocoMetric
from lors_plugin.registry import METRICS

HEIGHT, WIDTH = 480, 640
MULTI_SCALE = list(range(480, 801, 32))


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'number7.png'
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
    mmcv.imwrite(pixels.astype(np.uint8), str(path))
    return path


@pytest.fixture
def run(read_config, image):
    """``run(path, 'train', times)``: what a pipeline gives for an image."""

    def make(path, part, times=1):
        config = read_config(path)
        dataset = config[f'{part}_dataloader'].dataset
        with DefaultScope.overwrite_default_scope('mmdet'):
            pipeline = Compose(dataset.pipeline)
        samples = []
        for seed in range(times):
            random.seed(seed)
            np.random.seed(seed)
            samples.append(
                pipeline(
                    dict(
                        img_path=str(image),
                        img_id=7,
                        height=HEIGHT,
                        width=WIDTH,
                        instances=[
                            dict(bbox=box, bbox_label=0, ignore_flag=0)
                            for box in (
                                [40, 60, 600, 440],
                                [100, 100, 180, 220],
                            )
                        ],
                    )
                )
            )
        return [sample for sample in samples if sample is not None]

    return make


def test_training_images(path, run):
    """Images and boxes fit each other."""
    samples = run(path, 'train', 4)
    assert samples
    for sample in samples:
        data = sample['data_samples']
        height, width = data.img_shape
        assert sample['inputs'].shape == (3, height, width)
        instances = data.gt_instances
        boxes = instances.bboxes.tensor
        assert len(boxes) == len(instances.labels)
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= boxes.new_tensor([width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize('part', ['val', 'test'])
def test_test_images(path, part, run):
    (sample,) = run(path, part)
    data = sample['data_samples']
    assert data.ori_shape == (HEIGHT, WIDTH)
    assert data.img_id == 7
    height, width = data.img_shape
    assert sample['inputs'].shape == (3, height, width)
    assert data.scale_factor == pytest.approx(
        (width / WIDTH, height / HEIGHT), abs=1e-3
    )
    if path.endswith('_coco.py'):
        assert (height, width) == (800, 1067)


def test_sizes_of_the_recipe(coco_path, run):
    number = 1 if coco_path.endswith('1x_coco.py') else 24
    sizes = [
        tuple(s['inputs'].shape[1:]) for s in run(coco_path, 'train', number)
    ]
    if number == 1:
        assert sizes == [(800, 1067)]
        return
    for height, width in sizes:
        # The long side of a flat crop may come first.
        assert min(height, width) in MULTI_SCALE or max(height, width) == 1333
    whole = [abs(w / h - WIDTH / HEIGHT) < 0.01 for h, w in sizes]
    if '-crop-' in coco_path:
        assert 6 <= sum(whole) <= 18
    else:
        assert all(whole)
        assert len(set(sizes)) > 5


def test_images_are_flipped(coco_path, run):
    flips = [s['data_samples'].flip for s in run(coco_path, 'train', 8)]
    assert {True, False} == set(flips)


def test_data_sets(path, read_config):
    """Training and evaluation know the same classes, and the decoder too."""
    config = read_config(path)
    train, val = config.train_dataloader, config.val_dataloader
    classes = {
        len(d.dataset.metainfo.classes) if 'metainfo' in d.dataset else 80
        for d in (train, val)
    }
    assert classes == {config.model.decoder.num_classes}
    assert config.val_evaluator.ann_file.endswith(val.dataset.ann_file)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        assert evaluator.type == 'lors_plugin.CocoMetric'
        with DefaultScope.overwrite_default_scope('mmdet'):
            metric = METRICS.build({**evaluator, 'ann_file': None})
        assert isinstance(metric, CocoMetric)
    assert train.dataset.ann_file != val.dataset.ann_file
