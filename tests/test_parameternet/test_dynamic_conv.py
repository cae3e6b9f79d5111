"""Dynamic convolution as a layer, and its routing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import nn
from torch.testing import assert_close

from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.routing import ExpertRouter
from lors_plugin.testing import randomize

ROUTINGS = ('softmax_mlp', 'sigmoid_linear')


def layer(*args, **kwargs):
    return randomize(DynamicConv2d(*args, **kwargs), 0)


def by_hand(conv, x, attention):
    """Image by image, with ``nn.functional.conv2d`` alone."""
    outs = []
    for image, a in zip(x, attention):
        kernel = torch.einsum('m,m...->...', a, conv.weight)
        bias = None if conv.bias is None else a @ conv.bias
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        outs.append(F.conv2d(image[None], kernel, bias, *geometry))
    return torch.cat(outs)


@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('bias', [True, False])
def test_the_formula(routing, bias):
    conv = layer(4, 6, 3, 2, 1, 1, 2, bias, 3, routing, temperature=2.0)
    x = torch.randn(3, 4, 7, 6)
    router, pooled = conv.routing, x.mean((2, 3))
    if routing == 'softmax_mlp':
        hidden = F.relu(F.linear(pooled, *router.hidden.parameters()))
        logits = F.linear(hidden, *router.fc.parameters())
        attention = (logits / 2).softmax(-1)
    else:
        logits = F.linear(pooled, *router.fc.parameters())
        attention = (logits / 2).sigmoid()
    assert_close(conv(x), by_hand(conv, x, attention), rtol=1e-4, atol=1e-5)


def test_one_expert_is_a_plain_convolution():
    conv = layer(4, 6, (3, 1), bias=True, num_experts=1, padding=(1, 0))
    x = torch.randn(2, 4, 5, 5)
    wanted = F.conv2d(x, conv.weight[0], conv.bias[0], padding=(1, 0))
    assert_close(conv(x), wanted)
    assert conv.routing is None


def test_sizes_as_the_paper_counts_them():
    """About M + 1 / k^2 times a plain convolution, with the hidden layer."""
    conv = DynamicConv2d(32, 32, 3)
    plain = 32 * 32 * 9
    count = sum(p.numel() for p in conv.parameters())
    assert count == 4 * plain + (32 * 32 + 32) + (32 * 4 + 4)
    released = DynamicConv2d(32, 32, 3, routing='sigmoid_linear')
    count = sum(p.numel() for p in released.parameters())
    assert count == 4 * plain + 32 * 4 + 4


@pytest.mark.parametrize('num_experts', [2, 4, 8])
@pytest.mark.parametrize('routing', ROUTINGS)
def test_starts_with_the_statistics_of_a_plain_layer(routing, num_experts):
    """Of the mixture, as the first images meet it."""
    conv = DynamicConv2d(
        64, 64, 3, bias=True, num_experts=num_experts, routing=routing
    )
    plain = nn.Conv2d(64, 64, 3)
    x = torch.randn(4, 64, 8, 8)
    attention = conv.routing(x.mean((2, 3)))
    kernel = torch.einsum('m,m...->...', attention[0], conv.weight)
    assert_close(kernel.std(), plain.weight.std(), rtol=0.05, atol=0)
    bias = torch.einsum('m,m...->...', attention[0], conv.bias)
    assert 0.5 < bias.std() / plain.bias.std() < 2
    assert_close(conv(x).std(), plain(x).std(), rtol=0.1, atol=0)
    conv.reset_parameters(lambda w: nn.init.kaiming_normal_(w, mode='fan_out'))
    kernel = torch.einsum('m,m...->...', attention[0], conv.weight)
    assert_close(kernel.std().item(), (2 / (64 * 9)) ** 0.5, rtol=0.05, atol=0)
    assert not torch.equal(conv.weight[0], conv.weight[1])


def test_trains_and_every_part_has_a_gradient():
    conv = layer(4, 6, 1, bias=True)
    conv(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for name, param in conv.named_parameters():
        assert param.grad.abs().sum() > 0, name


def test_routing_is_float32_under_autocast():
    """Half a digit of the weights would be lost otherwise."""
    router = randomize(ExpertRouter(8, 4), 0)
    pooled = torch.randn(3, 8)
    wanted = router(pooled)
    with torch.autocast('cpu', torch.bfloat16):
        found = router(pooled)
        out = layer(8, 6, 1)(torch.randn(2, 8, 3, 3))
    assert found.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert router.double()(pooled.double()).dtype == torch.float64
    assert router.bfloat16()(pooled.bfloat16()).dtype == torch.float32


def test_temperature_flattens_the_routing():
    cold, warm = (
        randomize(ExpertRouter(8, 4, temperature=t), 0) for t in (1, 30)
    )
    pooled = torch.randn(3, 8)
    assert cold(pooled).std() > 10 * warm(pooled).std()


def test_a_host_builds_it():
    """Any backbone with ``conv_cfg`` can have it."""
    module = ConvModule(
        4,
        6,
        3,
        stride=2,
        padding=1,
        conv_cfg=dict(type='lors_plugin.DynamicConv2d', num_experts=2),
        norm_cfg=dict(type='BN'),
    )
    before = module.conv.weight.clone()
    module.init_weights()
    assert torch.equal(module.conv.weight, before)
    assert module.conv.bias is None
    assert module(torch.randn(2, 4, 7, 7)).shape == (2, 6, 4, 4)


def test_copies_and_state_dicts():
    conv = layer(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    twin = copy.deepcopy(conv)
    assert_close(twin(x), conv(x))
    other = DynamicConv2d(4, 6, 3)
    other.load_state_dict(conv.state_dict())
    assert_close(other(x), conv(x))
    assert 'num_experts=4' in repr(conv)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(groups=3), 'in_channels=4'),
        (dict(num_experts=0), 'num_experts=0'),
        (dict(routing='top1'), "routing='top1'"),
        (dict(temperature=0), 'temperature=0'),
        (dict(kernel_size=0), 'kernel_size=0'),
        (dict(in_channels=0), 'in_channels=0'),
        (dict(out_channels=-2), 'out_channels=-2'),
        (dict(groups=0), 'groups=0'),
        (dict(stride=0), 'stride=0'),
        (dict(dilation=(1, 2, 3)), 'dilation='),
        (dict(padding=-1), 'padding=-1'),
        (dict(padding='full'), "padding='full'"),
        (dict(padding='same', stride=2), "padding='same'.*stride 1"),
        (dict(padding='same', kernel_size=2), "padding='same'"),
    ],
)
def test_what_cannot_be_built(options, words):
    with pytest.raises(ValueError, match=words):
        given = dict(in_channels=4, out_channels=6, kernel_size=3)
        DynamicConv2d(**{**given, **options})


@pytest.mark.parametrize('padding', ['same', 'valid'])
def test_padding_by_name(padding):
    conv = layer(4, 6, (3, 5), padding=padding, dilation=(2, 1))
    plain = nn.Conv2d(4, 6, (3, 5), padding=padding, dilation=(2, 1))
    x = torch.randn(2, 4, 9, 8)
    assert conv(x).shape == plain(x).shape


def test_channels_last_and_quantised_routing():
    """Experts of five dimensions stay contiguous, values stay the same."""
    conv = layer(4, 6, 3, bias=True)
    x = torch.randn(2, 4, 7, 7)
    wanted = conv(x)
    copied = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    assert copied.weight.is_contiguous()
    assert copied.weight.shape == conv.weight.shape
    last = x.contiguous(memory_format=torch.channels_last)
    assert_close(copied(last), wanted)
    assert copied.half().double().weight.dtype == torch.float64
    quantised = torch.ao.quantization.quantize_dynamic(conv, {nn.Linear})
    assert not isinstance(quantised.routing.fc, nn.Linear)
    assert_close(quantised(x), wanted, rtol=0.05, atol=0.05)
