"""Models with random weights and what they are loaded from."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.build import build_model
from lors_plugin.inference import load_predictor
from lors_plugin.testing import randomize

CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=16,
            num_layers=2,
            num_heads=2,
            feedforward_channels=32,
        ),
        img_size=32,
        patch_size=8,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16),
    data_preprocessor=dict(
        mean=[127.0] * 3, std=[64.0] * 3, to_rgb=True, num_classes=3
    ),
)
CLASSES = ('cat', 'dog', '牛')


@pytest.fixture(scope='session')
def new_config(tiny_config):
    """``new_config('detector')``, with further entries of a config."""
    models = dict(detector=tiny_config(), classifier=CLASSIFIER)
    return lambda kind, **extra: make_config(models[kind], kind, **extra)


def make_config(model, kind, **extra):
    """The config of a detector or classifier, as a file has it."""
    detector = kind == 'detector'
    last = 'PackDetInputs' if detector else 'PackInputs'
    steps = [
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
    ]
    if not detector:
        steps = [dict(type='Resize', scale=32)]
    loader = dict(
        dataset=dict(
            type='CocoDataset' if detector else 'CustomDataset',
            metainfo=dict(classes=CLASSES),
            pipeline=[
                dict(type='LoadImageFromFile'),
                *steps,
                dict(type=last),
            ],
        )
    )
    return Config(
        dict(
            default_scope='mmdet' if detector else 'mmpretrain',
            model=model,
            test_dataloader=loader,
            **extra,
        )
    )


@pytest.fixture(scope='session')
def weights(tmp_path_factory, new_config):
    """A checkpoint of each kind."""
    root = tmp_path_factory.mktemp('weights')
    paths = {}
    for kind in ('detector', 'classifier'):
        model = randomize(build_model(new_config(kind)), 0)
        paths[kind] = root / f'{kind}.pth'
        meta = dict(dataset_meta=dict(classes=CLASSES))
        content = dict(state_dict=model.state_dict(), meta=meta)
        torch.save(content, paths[kind])
    return paths


@pytest.fixture
def predictor(weights, new_config):
    """``predictor('detector')`` or ``predictor('classifier')``."""

    def make(kind):
        return load_predictor(new_config(kind), weights[kind])

    return make


@pytest.fixture
def photo(tmp_path):
    """A smooth picture that is not square."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / 'photo 照片.png'
    pixels = cv2.resize(coarse, (180, 120), interpolation=cv2.INTER_CUBIC)
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
    return path
