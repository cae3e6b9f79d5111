"""Backbones of the hosts under the detector, as users put them there."""

import re

import pytest
import torch

BACKBONES = {
    'mobilenetv2-frozen': (
        dict(type='MobileNetV2', out_indices=(1, 2, 4), frozen_stages=2),
        [24, 32, 96],
    ),
    'swin': (
        dict(
            type='SwinTransformer',
            embed_dims=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 4),
            window_size=4,
            out_indices=(0, 1, 2),
            frozen_stages=1,
        ),
        [12, 24, 48],
    ),
    'pvt': (
        dict(
            type='PyramidVisionTransformerV2',
            embed_dims=8,
            num_layers=(1, 1, 1, 1),
            out_indices=(0, 1, 2),
        ),
        [8, 16, 40],
    ),
    'resnet': (
        dict(
            type='ResNet',
            depth=18,
            base_channels=8,
            out_indices=(0, 1, 2),
            frozen_stages=1,
        ),
        [8, 16, 32],
    ),
}


@pytest.fixture(params=list(BACKBONES))
def detector(request, build, tiny_config):
    backbone, channels = BACKBONES[request.param]
    config = tiny_config(
        neck=dict(in_channels=channels), decoder=dict(strides=(4, 8, 16))
    )
    config['backbone'] = dict(backbone)
    return build(config)


def names_to_train(model):
    return {k for k, p in model.named_parameters() if p.requires_grad}


def test_what_is_frozen_is_frozen_when_built(detector):
    """A wrapper for several processes looks before the first ``train()``."""
    before = names_to_train(detector)
    detector.train()
    assert names_to_train(detector) == before


def test_all_that_is_trained_gets_a_gradient(detector, make_samples):
    detector.train()
    losses = detector.loss(torch.randn(2, 3, 64, 96), make_samples())
    sum(losses.values()).backward()
    unused = {
        key
        for key, param in detector.named_parameters()
        if param.requires_grad and param.grad is None
    }
    assert not unused


def test_levels_that_strides_do_not_describe(tiny_detector, make_samples):
    """Another number of levels, or right number and wrong strides."""
    for strides in ((4, 8, 16), (8, 16, 32, 64)):
        detector = tiny_detector(decoder=dict(strides=strides))
        message = 'set decoder.strides=(4, 8, 16, 32)'
        with pytest.raises(ValueError, match=re.escape(message)):
            detector.loss(torch.randn(2, 3, 64, 96), make_samples())
