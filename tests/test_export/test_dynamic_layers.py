"""Dynamic layers for export do what those of training do."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from lors_plugin.export.dynamic_layers import (
    ExportDynamicConv2d,
    ExportDynamicLinear,
    replace_dynamic,
)
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.dynamic_linear import DynamicLinear
from lors_plugin.parameternet.ghost import ConvNorm


def lively(layer):
    """Routing that differs from image to image."""
    layer.routing.fc.weight.data.normal_()
    return layer.eval()


@pytest.mark.parametrize(
    'kernel, options',
    [
        (1, dict()),
        (1, dict(stride=2, bias=True)),
        (1, dict(groups=2)),
        (1, dict(padding=1)),
        (3, dict(stride=2, padding=1)),
        (5, dict(groups=6, padding=2, bias=True)),
        ((3, 1), dict(groups=3, stride=(1, 2), dilation=2)),
    ],
)
@pytest.mark.parametrize('routing', ['softmax_mlp', 'sigmoid_linear'])
@pytest.mark.parametrize('number', [None, 3])
def test_convolutions(kernel, options, routing, number):
    layer = lively(
        DynamicConv2d(6, 12, kernel, routing=routing, **options)
    ).double()
    export = ExportDynamicConv2d(layer, number=number)
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(export(x), layer(x))
    assert not torch.allclose(layer(x[:1]), layer(x[:1] + 1) - layer(x[:1]))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('number', [None, 2])
def test_a_norm_becomes_a_part_of_the_kernels(bias, groups, number):
    layer = lively(DynamicConv2d(6, 6, 3, bias=bias, groups=groups))
    norm = nn.BatchNorm2d(6).eval()
    for tensor in (norm.running_var, norm.weight.data):
        tensor.uniform_(0.5, 2.0)
    for tensor in (norm.running_mean, norm.bias.data):
        tensor.normal_()
    x = torch.randn(2, 6, 7, 7)
    with torch.no_grad():
        found = ExportDynamicConv2d(layer, norm, number)(x)
        torch.testing.assert_close(found, norm(layer(x)), atol=1e-5, rtol=0)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(3, 5, 6), (3, 2, 4, 6), (3, 6)])
def test_linear(bias, shape):
    layer = lively(DynamicLinear(6, 4, bias=bias))
    x = torch.randn(shape)
    torch.testing.assert_close(ExportDynamicLinear(layer)(x), layer(x))


def test_replaced_in_a_model():
    def layer(experts, **norm):
        conv = DynamicConv2d(4, 4, 1, num_experts=experts)
        return ConvNorm(conv, 4, dict(type='BN', **norm))

    model = nn.Sequential(
        layer(4), layer(3, track_running_stats=False), layer(1)
    ).eval()
    model[0].norm.running_mean.normal_()
    export = copy.deepcopy(model)
    assert replace_dynamic(export) == 2
    kinds = [(type(m.conv), type(m.norm)) for m in export]
    assert kinds == [
        (ExportDynamicConv2d, nn.Identity),
        (ExportDynamicConv2d, nn.BatchNorm2d),
        (DynamicConv2d, nn.BatchNorm2d),
    ]
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(export(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    'order', [('conv', 'norm', 'act'), ('norm', 'conv', 'act'),
              ('conv', 'act', 'norm')]
)  # fmt: skip
@pytest.mark.parametrize('norm', ['BN', 'GN', None])
def test_modules_of_the_host(order, norm):
    """A norm is folded once, and only where it follows the convolution."""
    norm_cfg = dict(type=norm) if norm else None
    if norm == 'GN':
        norm_cfg['num_groups'] = 2
    module = ConvModule(
        6, 6, 3, conv_cfg=dict(type='lors_plugin.DynamicConv2d'),
        norm_cfg=norm_cfg, order=order,
    )  # fmt: skip
    lively(module.conv)
    if norm:
        for tensor in module.norm.buffers():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
        module.norm.weight.data.uniform_(0.5, 2.0)
        module.norm.bias.data.normal_()
    model = nn.Sequential(module.eval())
    x = torch.randn(2, 6, 7, 7)
    with torch.no_grad():
        expected = model(x)
        assert replace_dynamic(model) == 1
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    folded = norm == 'BN' and order[:2] == ('conv', 'norm')
    if norm:
        assert isinstance(module.norm, nn.Identity) == folded
