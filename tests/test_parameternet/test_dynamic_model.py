"""Dynamic layers in any model, by their names."""

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch import nn

from lors_plugin.parameternet import (
    DynamicConv2d,
    DynamicLinear,
    make_dynamic,
)
from lors_plugin.registry import MODELS


def network(*layers):
    """Layers with a bias that is not zero, under the names '0', '1', ..."""
    return nn.Sequential(*layers).double()


def one_expert(layer, dynamic):
    """Let all experts, and so the mixture, be a plain layer's weight."""
    attention = dynamic.routing.start * dynamic.num_experts
    nn.init.zeros_(dynamic.routing.fc.weight)
    dynamic.weight.data[:] = layer.weight.data / attention
    dynamic.bias.data[:] = layer.bias.data / attention


@pytest.mark.parametrize('size', [(7, 9), (8, 8), (1, 2)])
@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2),
        nn.Conv2d(4, 6, 3, padding='same', dilation=2),
        Conv2dAdaptivePadding(4, 6, 3, stride=2),
        Conv2dAdaptivePadding(4, 6, 5, stride=(2, 3), dilation=(1, 2)),
        Conv2dAdaptivePadding(4, 6, 1, stride=2),
    ],
    ids=str,
)
def test_equal_experts_compute_the_plain_convolution(layer, size):
    """Geometry and padding are those of the layer that was replaced."""
    model = network(layer)
    x = torch.randn(2, 4, *size).double()
    expected = model(x)
    assert make_dynamic(model, ['0'], num_experts=3) == ['0']
    (dynamic,) = (m for m in model.modules() if isinstance(m, DynamicConv2d))
    one_expert(layer, dynamic)
    torch.testing.assert_close(model(x), expected)


def test_equal_experts_compute_the_plain_linear_layer():
    layer = nn.Linear(4, 6)
    model = network(layer)
    x = torch.randn(2, 5, 4).double()
    expected = model(x)
    make_dynamic(
        model, [r'\d'], num_experts=3, routing='sigmoid_linear', temperature=2
    )
    assert type(model[0]) is DynamicLinear
    assert model[0].routing.temperature == 2
    one_expert(layer, model[0])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('routing', ['softmax_mlp', 'sigmoid_linear'])
def test_starts_with_the_statistics_of_plain_layers(routing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(256, 256))
    model.requires_grad_(False).eval()
    make_dynamic(model, [r'\d'], routing=routing)
    conv, linear = model
    mixed = conv.weight.sum(0) * conv.routing.start
    assert mixed.std().item() == pytest.approx((2 / 64 / 9) ** 0.5, rel=0.05)
    mixed = linear.weight.sum(0) * linear.routing.start
    assert mixed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not linear.bias.any()
    assert not any(p.requires_grad or m.training for m in model.modules()
                   for p in m.parameters())  # fmt: skip


class Partial(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ('model', 'targets', 'message'),
    [
        (nn.Sequential(nn.Linear(2, 2)), ['1'], "'1' matches no convolution"),
        (nn.Sequential(nn.Linear(2, 2)), '0', "targets='0' must be a list"),
        (nn.Sequential(nn.Linear(2, 2)), [], 'must be a list'),
        (nn.Sequential(nn.Linear(2, 2)), 3, 'must be a list'),
        (nn.Sequential(nn.Linear(2, 2)), ['('], 'no regular expression'),
        (nn.Sequential(Partial(2, 2, 1)), ['0'], 'a Partial computes more'),
        (
            nn.Sequential(nn.Conv2d(2, 2, 3, padding_mode='circular')),
            ['0'],
            'zero padding',
        ),
        (nn.Linear(2, 2), [''], 'itself'),
        (
            nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)),
            ['0', r'1\.out_proj'],
            r'1\.out_proj cannot be dynamic: MultiheadAttention reads',
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refuses_and_changes_nothing(model, targets, message):
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        make_dynamic(model, targets)
    assert [type(module) for module in model.modules()] == kinds


def test_backbone_of_a_config_trains():
    from mmengine.registry import DefaultScope

    backbone = dict(
        type='lors_plugin.DynamicModel',
        module=dict(type='EfficientNetV2', arch='b0', out_indices=(1, 4)),
        targets=[r'layers\.(?!.*\.se\.).*'],
        num_experts=2,
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(backbone)
        with pytest.raises(ValueError, match='the model names a file'):
            module = {
                **backbone['module'],
                'init_cfg': dict(type='Pretrained', checkpoint='plain.pth'),
            }
            MODELS.build({**backbone, 'module': module})
    assert type(model).__name__ == 'EfficientNetV2'
    model.train()
    outs = model(torch.randn(2, 3, 33, 47))
    assert [tuple(out.shape[2:]) for out in outs] == [(17, 24), (3, 3)]
    sum(out.square().mean() for out in outs).backward()
    last = model.layers[4][1].linear_conv.conv
    assert type(last) is DynamicConv2d
    assert last.weight.grad.abs().sum() > 0
    assert last.routing.fc.weight.grad.abs().sum() > 0
