"""From a config to its model and its images."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from lors_plugin.build import (
    build_model,
    image_channels,
    load_config,
    padded_shape,
)
from lors_plugin.build import (
    test_pipeline as pipeline_of,
)
from lors_plugin.build import (
    test_shape as shape_of,
)


def config(*steps, scope='mmdet', wrap=None):
    dataset = dict(pipeline=list(steps))
    if wrap == 'one':
        dataset = dict(type='RepeatDataset', dataset=dataset)
    if wrap == 'several':
        other = dict(type='RepeatDataset', dataset=dataset)
        dataset = dict(type='ConcatDataset', datasets=[other, dataset])
    return dict(
        default_scope=scope, test_dataloader=dict(dataset=dataset), model={}
    )


@pytest.mark.parametrize(
    ('cfg', 'shape'),
    [
        (config(dict(type='Resize', scale=(1333, 800), keep_ratio=True)),
         (800, 1333)),
        (config(dict(type='mmdet.Resize', scale=(640, 480))), (480, 640)),
        (config(dict(type='Resize', scale=96), wrap='one'), (96, 96)),
        (config(dict(type='Resize', scale=96), wrap='several'), (96, 96)),
        (config(dict(type='ResizeEdge', scale=256),
                dict(type='CenterCrop', crop_size=224)), (224, 224)),
        (config(), (800, 1333)),
        (config(scope='mmpretrain'), (224, 224)),
        (dict(model={}), (224, 224)),
        (dict(model={}, test_dataloader=None), (224, 224)),
    ],
)  # fmt: skip
def test_shape_of_the_test_pipeline(cfg, shape):
    assert shape_of(cfg) == shape


def test_pipeline_inside_wrappers():
    step = dict(type='Resize', scale=96)
    assert pipeline_of(config(step, wrap='several')) == [step]


def test_padding(tiny_detector):
    assert padded_shape(tiny_detector(), (33, 64)) == (64, 64)


def test_data_preprocessor_as_the_runner_adds_it():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='LeNet5', num_classes=10),
            ),
            data_preprocessor=dict(mean=[33.0], std=[79.0], num_classes=10),
        )
    )
    model = build_model(cfg)
    assert model.data_preprocessor.mean.item() == 33
    assert 'data_preprocessor' not in cfg.model
    assert image_channels(model) == 1


@pytest.mark.parametrize(
    ('model', 'channels'),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.Conv2d(4, 8, 1)), 4),
        (nn.Linear(5, 3), 3),
    ],
)
def test_channels(model, channels):
    assert image_channels(model) == channels


def test_configs_of_packages_and_options():
    cfg = load_config(
        'mmpretrain::lenet/lenet5_mnist.py', {'model.backbone.num_classes': 7}
    )
    assert cfg.model.backbone.num_classes == 7
    logits = build_model(cfg)(torch.zeros(2, 1, 32, 32))
    assert logits[-1].shape[-1] == 7


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match='no config .*x.py'):
        load_config(tmp_path / 'x.py')
    (tmp_path / 'x.py').write_text('a = 1\n')
    with pytest.raises(ValueError, match='x.py has no model'):
        load_config(tmp_path / 'x.py')
