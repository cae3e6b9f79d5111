"""Sizes of images and forwards from configs."""

import pytest

from lors_plugin.analysis import test_shape as shape_of
from lors_plugin.build import padded_shape


def config(*steps, scope='mmdet', wrap=False):
    dataset = dict(pipeline=list(steps))
    if wrap:
        dataset = dict(type='RepeatDataset', dataset=dataset)
    return dict(
        default_scope=scope, test_dataloader=dict(dataset=dataset), model={}
    )


@pytest.mark.parametrize(
    ('cfg', 'shape'),
    [
        (config(dict(type='Resize', scale=(1333, 800), keep_ratio=True)),
         (800, 1333)),
        (config(dict(type='mmdet.Resize', scale=(640, 480))), (480, 640)),
        (config(dict(type='Resize', scale=96), wrap=True), (96, 96)),
        (config(dict(type='ResizeEdge', scale=256),
                dict(type='CenterCrop', crop_size=224)), (224, 224)),
        (config(), (800, 1333)),
        (config(scope='mmpretrain'), (224, 224)),
        (dict(model={}), (224, 224)),
    ],
)  # fmt: skip
def test_shape_of_the_test_pipeline(cfg, shape):
    assert shape_of(cfg) == shape


def test_padding(tiny_detector):
    assert padded_shape(tiny_detector(), (33, 64)) == (64, 64)
