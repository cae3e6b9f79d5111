"""A bias that merging makes finds its place in a host without one."""

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from lors_plugin.reparam import MergeError
from lors_plugin.reparam.biases import fit_biases
from lors_plugin.testing import randomize


class Block(nn.Module):
    """Named as in the ResNet of the hosts."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)

    @property
    def norm1(self):
        return self.bn1

    def forward(self, x):
        return self.norm1(self.conv1(x))


def sequential():
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))


def conv_module(**kwargs):
    return ConvModule(3, 4, 1, norm_cfg=dict(type='BN'), **kwargs)


def without_bias(qkv_bias=False, last=False):
    return nn.ModuleDict(
        dict(
            a=nn.Linear(3, 4, bias=qkv_bias),
            b=nn.Linear(4, 4, bias=qkv_bias),
            c=nn.Linear(4, 4, bias=last),
        )
    )


@pytest.mark.parametrize(
    'make, name',
    [(Block, 'conv1'), (sequential, '0'), (conv_module, 'conv')],
)
@torch.no_grad()
def test_running_mean_takes_it(make, name):
    host = randomize(nn.Sequential(make()), 0).eval()
    x = torch.randn(2, 3, 5, 5)
    bias = torch.randn(4)
    layer = host[0].get_submodule(name)
    layer.bias = nn.Parameter(bias)
    wanted = host(x)
    state = host.state_dict()
    assert f'0.{name}.bias' in state
    plain = fit_biases({}, lambda: nn.Sequential(make()).eval(), state)
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(x), wanted)


def test_an_option_of_the_host_and_zeros_for_the_rest():
    state = without_bias(True).state_dict()
    del state['b.bias']
    bias = state['a.bias'].clone()
    config = dict(backbone=dict(qkv_bias=False))
    host = fit_biases(
        config, lambda: without_bias(**config['backbone']), state
    )
    assert config['backbone']['qkv_bias'] is True
    host.load_state_dict(state, strict=True)
    assert torch.equal(host['a'].bias, bias)
    assert not host['b'].bias.any()


def test_an_option_that_does_not_help_stays():
    state = without_bias(True, last=True).state_dict()
    config = dict(qkv_bias=False, bias=False)

    def build():
        return without_bias(config['qkv_bias'])

    with pytest.raises(MergeError, match=r'gives c a bias.*exclude='):
        fit_biases(config, build, state)
    assert config == dict(qkv_bias=True, bias=False)


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()),
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False),
            nn.BatchNorm2d(4, track_running_stats=False),
        ),
        lambda: nn.Sequential(conv_module(order=('norm', 'conv', 'act'))),
        lambda: nn.Sequential(
            ConvModule(3, 4, 1, norm_cfg=dict(type='GN', num_groups=2))
        ),
    ],
)
def test_no_place(make):
    state = make().state_dict()
    name = 'conv' if '0.conv.weight' in state else ''
    key = '.'.join(filter(None, ['0', name, 'bias']))
    state[key] = torch.ones(4)
    with pytest.raises(MergeError, match='exclude='):
        fit_biases({}, make, state)
