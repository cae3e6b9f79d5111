"""Adapters in models: where they go, what is trained, what is refused."""

import copy

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import nn
from torch.nn.utils import parametrizations

from lors_plugin.adapters import (
    RepAdapter,
    SiteError,
    adapters_of,
    inject_adapters,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return self.fc(x) + self.qkv(input=x).chunk(3, -1)[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


TARGETS = [r'\d\.qkv', r'\d\.fc']


def test_only_adapters_and_the_head_are_trained(net):
    keys = set(net.state_dict())
    report = inject_adapters(net, targets=TARGETS)
    assert keys < set(net.state_dict())
    assert report.adapted == [
        'backbone.0.qkv',
        'backbone.0.fc',
        'backbone.1.qkv',
        'backbone.1.fc',
    ]
    assert list(adapters_of(net)) == report.adapted
    count = sum(p.numel() for p in RepAdapter(8).parameters())
    assert report.trained == dict(adapters=4 * count, head=18)
    assert report.frozen == dict(backbone=2 * (16 + 24 * 9 + 64))
    assert f'{4 * count + 18:,}' in report.table()
    x = torch.randn(3, 8)
    net(x).square().sum().backward()
    for name, param in net.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name


def test_the_input_is_adapted_by_position_and_by_name(net):
    x = torch.randn(3, 8)
    layer = net.backbone[0].qkv
    inject_adapters(net, targets=[r'0\.qkv'], dropout=0)
    layer.rep_adapter.up_bias.data.fill_(1.0)
    wanted = nn.functional.linear(x + 1, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(input=x), wanted)


def test_one_pattern_needs_no_brackets(net):
    report = inject_adapters(net, targets=r'0\.qkv', trainable=r'\d\.norm')
    assert report.adapted == ['backbone.0.qkv']
    assert report.trained['backbone'] == 32


def test_trainable_patterns(net):
    report = inject_adapters(
        net, targets=TARGETS, trainable=[r'\d+\.norm', r'1\.qkv\.bias']
    )
    assert report.trained['backbone'] == 2 * 16 + 24
    assert net.backbone[1].qkv.bias.requires_grad
    assert not net.backbone[0].qkv.bias.requires_grad


def test_what_was_frozen_stays_frozen(net):
    net.backbone[0].norm.requires_grad_(False)
    report = inject_adapters(net, targets=TARGETS, trainable=[r'\d\.norm'])
    assert report.trained['backbone'] == 16


@pytest.mark.parametrize('exclude', [[r'0\..*'], '0', ['0.qkv', '0.fc']])
def test_exclude(net, exclude):
    report = inject_adapters(net, targets=TARGETS, exclude=exclude)
    assert report.adapted == ['backbone.1.qkv', 'backbone.1.fc']


@pytest.mark.parametrize('target', ['0', r'0\.qkv'])
@pytest.mark.parametrize('exclude', [r'1', r'1\.qkv'])
def test_exclude_by_any_name_of_an_attention(target, exclude):
    """Given by the one, placed at the other: BEiT's with a plain bias."""
    model = nn.Sequential(Block(), Block())
    targets = [target.replace('0', r'\d')]
    report = inject_adapters(model, '', targets=targets, exclude=exclude)
    assert report.adapted == ['0.qkv']


def test_a_copy_has_adapters_of_its_own(net):
    inject_adapters(net, targets=TARGETS, dropout=0)
    other = copy.deepcopy(net)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), other(x))
    other.backbone[0].qkv.rep_adapter.up_bias.data.fill_(1.0)
    assert not torch.equal(net(x), other(x))


def test_adapters_are_in_the_mode_and_dtype_of_their_layer(net):
    net.eval().double()
    inject_adapters(net, targets=TARGETS)
    adapter = net.backbone[0].qkv.rep_adapter
    assert not adapter.training
    assert adapter.down_weight.dtype == torch.float64


def test_any_layer_that_can_swallow_an_adapter(net):
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3))
    report = inject_adapters(model, '', targets=['0', '1'], hidden_dims=4)
    assert report.adapted == ['0', '1']
    assert model(torch.randn(1, 8, 5, 5)).shape == (1, 6, 3, 3)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x))


class SplitBiases(nn.Module):
    """Like BEiT's, but what is done to the keys nobody knows."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(8))
        self.v_bias = nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize(
    'module, match',
    [
        (nn.Conv2d(8, 8, 3, padding=1), 'zero padding'),
        (nn.Conv2d(8, 8, 3, padding='same'), 'zero padding'),
        (nn.Conv2d(8, 8, 7, groups=8), 'pointwise_conv1'),
        (nn.Conv2d(8, 8, 1, padding=1), 'zero padding'),
        (Conv2dAdaptivePadding(8, 8, 3), 'zero padding'),
        (ConvWS2d(8, 8, 1), 'forward of its own.*plain Conv2d'),
        (Normed(8, 8), 'forward of its own.*plain Linear'),
        (parametrizations.weight_norm(nn.Linear(8, 8)), 'computed from'),
        (SplitBiases(), 'SplitBiases reads the weights.*BEiTAttention'),
        (nn.LayerNorm(8), 'LayerNorm is neither'),
    ],
)
def test_impossible_places_are_refused_before_anything_happens(module, match):
    model = nn.ModuleDict(dict(good=nn.Linear(8, 8), bad=module))
    with pytest.raises(SiteError, match=match) as error:
        inject_adapters(model, '', targets=['good', 'bad'])
    assert 'bad: ' in str(error.value)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    'options, match',
    [
        (dict(module='trunk'), r"no part 'trunk'.*backbone.*head"),
        (dict(targets=['qkv']), 'found inside .*0.qkv.*whole name'),
        (dict(targets=['attn']), 'matches no module.*named like'),
        (dict(), 'no preset for Sequential.*MMSegmentation'),
        (dict(targets=TARGETS, exclude=['.*']), 'leaves nothing'),
        (dict(targets=TARGETS, exclude=['0.norm']), 'leaves out none.*1.qkv'),
        (dict(targets='0.[qkv'), 'targets: .*no regular expression'),
        (dict(targets=TARGETS, exclude=[None]), 'exclude: None is no regular'),
        (dict(targets=TARGETS, trainable=['normal']), "'normal' matches no"),
        (dict(targets=TARGETS, groups=3), 'divisible by groups=3'),
    ],
)
def test_bad_options_leave_the_model_alone(net, options, match):
    with pytest.raises(ValueError, match=match):
        inject_adapters(net, **options)
    assert not adapters_of(net)
    assert all(p.requires_grad for p in net.parameters())


def test_twice_is_an_error(net):
    inject_adapters(net, targets=TARGETS)
    with pytest.raises(ValueError, match='has adapters already'):
        inject_adapters(net, targets=TARGETS)
