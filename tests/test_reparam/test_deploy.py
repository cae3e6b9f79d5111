"""The deployed config builds the merged model; biases find their place."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from torch import nn

from lors_plugin.reparam import MergeError
from lors_plugin.reparam.deploy import deployed_config, fit_biases
from lors_plugin.testing import randomize

STACK = dict(
    type='lors_plugin.LORSStack',
    module=dict(type='VisionTransformer', arch='deit-tiny'),
    targets=['a'],
)
PRETRAINED = dict(type='Pretrained', checkpoint='a.pth')


def deployed(model, **rest):
    cfg = Config(dict(default_scope='mmpretrain', model=model, **rest))
    before = cfg.pretty_text
    new, notes = deployed_config(cfg)
    assert cfg.pretty_text == before
    return new, notes


def test_structure_that_merged_is_gone():
    model = dict(
        type='ImageClassifier',
        backbone=STACK,
        neck=[dict(type='Neck', conv_cfg=dict(type='lors_plugin.RepConv2d'))],
        head=dict(type='Head', conv_cfg=dict(type='Conv2d')),
    )
    hooks = [dict(type='lors_plugin.LORSHook'), dict(type='EMAHook')]
    new, notes = deployed(model, custom_hooks=hooks)
    assert new.model == dict(
        type='ImageClassifier',
        backbone=STACK['module'],
        neck=[dict(type='Neck', conv_cfg=None)],
        head=dict(type='Head', conv_cfg=dict(type='Conv2d')),
    )
    assert new.custom_hooks == [dict(type='EMAHook')]
    assert not notes


def test_no_file_of_pretrained_weights_is_named():
    trunc = dict(type='TruncNormal', layer='Linear', std=0.02)
    model = dict(
        type='ImageClassifier',
        pretrained='a.pth',
        backbone=dict(type='A', init_cfg=PRETRAINED, pretrained=True),
        head=dict(type='B', init_cfg=[trunc, PRETRAINED]),
    )
    new, _ = deployed(model, load_from='a.pth', resume=True, work_dir='w')
    assert new.to_dict() == dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='A'),
            head=dict(type='B', init_cfg=[trunc]),
        ),
    )


REST = dict(
    custom_imports=dict(imports=['lors_plugin', 'mine']),
    val_evaluator=[dict(type='lors_plugin.CocoMetric', backend='faster')],
    default_hooks=dict(
        seed=dict(type='lors_plugin.EpochSeedHook'),
        timer=dict(type='IterTimerHook'),
    ),
    custom_hooks=[dict(type='lors_plugin.FreezeHook', modules=['backbone'])],
)


def test_a_host_model_needs_nothing_of_the_plugin():
    new, notes = deployed(dict(type='ImageClassifier'), **REST)
    assert 'lors_plugin' not in new.pretty_text
    assert new.custom_imports.imports == ['mine']
    assert new.val_evaluator == [dict(type='mmdet.CocoMetric')]
    assert list(new.default_hooks) == ['timer']
    assert 'custom_hooks' not in new
    assert notes == [
        'custom_imports.imports[0] is left out: lors_plugin',
        'default_hooks.seed is left out: lors_plugin.EpochSeedHook',
    ]


def test_a_model_of_the_plugin_keeps_the_rest():
    model = dict(type='lors_plugin.AdaMixer', backbone=dict(type='ResNet'))
    new, notes = deployed(model, **REST)
    for key in ('custom_imports', 'val_evaluator', 'default_hooks'):
        assert new[key] == REST[key]
    assert 'custom_hooks' not in new and not notes


def test_new_style_configs_name_classes():
    from lors_plugin.engine.hooks import RepAdapterHook
    from lors_plugin.evaluation import CocoMetric

    new, _ = deployed(
        dict(type='ImageClassifier'),
        custom_hooks=[dict(type=RepAdapterHook)],
        val_evaluator=dict(type=CocoMetric),
    )
    assert 'custom_hooks' not in new
    assert new.val_evaluator.type == 'mmdet.CocoMetric'


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
