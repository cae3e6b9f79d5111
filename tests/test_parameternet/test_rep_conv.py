"""Parallel branches that become one convolution."""

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.testing import assert_close

from lors_plugin.parameternet.rep_conv import RepConv2d
from lors_plugin.reparam import reparameterize, unmerge
from lors_plugin.testing import randomize

SHAPES = [
    dict(),
    dict(stride=2, padding=1, groups=2, bias=True),
    dict(dilation=2, num_branches=1),
    dict(norm_cfg=None),
    dict(norm_cfg=None, bias=True),
    dict(norm_cfg=dict(type='SyncBN'), num_branches=2),
    dict(num_branches=0),
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('options', SHAPES, ids=str)
def test_merged(options, dtype):
    conv = randomize(RepConv2d(4, 6, 3, **options), 0).eval().to(dtype)
    x = torch.randn(2, 4, 8, 7, dtype=dtype)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    merged = conv.merged()
    assert type(merged) is nn.Conv2d
    assert not merged.training
    assert merged.weight.dtype == dtype
    digits = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(merged(x), conv(x), rtol=digits, atol=digits)
    assert_close(conv.state_dict(), before, rtol=0, atol=0)


def test_in_a_model():
    model = nn.Sequential(RepConv2d(3, 4, 3), nn.ReLU(), RepConv2d(4, 2, 1))
    model = randomize(model, 0).eval()
    x = torch.randn(2, 3, 6, 6)
    wanted = model(x)
    assert reparameterize(model) > 0
    assert type(model[0]) is type(model[2]) is nn.Conv2d
    assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), wanted)


def test_branches_learn_something_else():
    """Each has a gradient of its own, and what they learn merges."""
    conv = RepConv2d(3, 4, 3, padding=1)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in conv.parameters())
    conv.eval()
    x = torch.randn(2, 3, 6, 6)
    assert_close(conv.merged()(x), conv(x), rtol=1e-4, atol=1e-5)


def test_frozen_stays_frozen():
    conv = RepConv2d(3, 4, 1).eval().requires_grad_(False)
    assert not any(p.requires_grad for p in conv.merged().parameters())


@pytest.mark.parametrize(
    'norm_cfg',
    [
        dict(type='GN', num_groups=2),
        dict(type='BN', track_running_stats=False),
    ],
)
def test_norms_that_cannot_merge(norm_cfg):
    with pytest.raises(ValueError, match='cannot be merged'):
        RepConv2d(4, 4, 3, norm_cfg=norm_cfg)


def test_negative():
    with pytest.raises(ValueError, match='num_branches=-1'):
        RepConv2d(4, 4, 3, num_branches=-1)


def test_a_host_builds_it():
    """Any backbone with ``conv_cfg`` can have it."""
    module = ConvModule(
        4,
        6,
        3,
        stride=2,
        padding=1,
        conv_cfg=dict(type='lors_plugin.RepConv2d', num_branches=2),
        norm_cfg=dict(type='BN'),
    )
    assert module.out_channels == module.conv.out_channels == 6
    assert module.stride == (2, 2)
    assert module(torch.randn(2, 4, 7, 7)).shape == (2, 6, 4, 4)
    assert len(module.conv.branches) == 2
