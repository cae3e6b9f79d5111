"""Sizes, outputs, freezing and options of ParameterNet."""

import pytest
import torch
from torch import nn

from lors_plugin.parameternet.backbone import ParameterNet
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.ghost import GhostModule, make_divisible
from lors_plugin.parameternet.rep_conv import RepConv2d
from lors_plugin.parameternet.routing import ExpertRouter
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

TINY = dict(
    width=0.5,
    rows=[
        [(3, 16, 16, 0, 1)],
        [(3, 48, 24, 0, 2)],
        [(5, 72, 40, 0.25, 2), (3, 120, 40, 0.25, 1)],
    ],
)
# Without the 1280 hidden channels and the 1000 classes.
HEAD = 1824 * 1280 + 1280 + 1280 * 1000 + 1000


def tiny(**options):
    return randomize(ParameterNet(TINY, **options))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ('options', 'number'),
    [({}, 34_504_504), (dict(num_experts=1), 19_822_198)],
    ids=['released', 'GhostNet'],
)
def test_parameters_of_600m(options, number):
    with torch.device('meta'):
        model = ParameterNet(**options)
    assert model.out_channels == (1824,)
    assert parameters(model) + HEAD == number


def test_levels_of_a_pyramid():
    x = torch.zeros(2, 3, 70, 45)
    model = ParameterNet('300m', num_experts=2, out_indices=(2, 4, 6, 8))
    outs = model.eval()(x)
    assert model.out_strides == (4, 8, 16, 32)
    assert [out.shape[1] for out in outs] == list(model.out_channels)
    assert [tuple(out.shape[2:]) for out in outs] == [
        (18, 12), (9, 6), (5, 3), (3, 2)
    ]  # fmt: skip


def test_nothing_is_built_behind_the_last_output():
    model = tiny(out_indices=(1, 0))
    assert len(model.stages) == 2
    assert model.out_channels == (12, 8)
    outs = model(torch.randn(2, 3, 32, 32))
    assert [tuple(out.shape) for out in outs] == [
        (2, 12, 8, 8),
        (2, 8, 16, 16),
    ]
    sum(out.sum() for out in outs).backward()
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_outputs_are_those_of_the_whole_network():
    x = torch.randn(2, 3, 32, 32)
    whole = tiny(out_indices=(0, 2, -1)).eval()
    part = ParameterNet(TINY, out_indices=(2,)).eval()
    part.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(part(x)[0], whole(x)[1])


def test_stem_stride():
    model = tiny(stem_stride=1, in_channels=1, out_indices=(0, -1))
    shapes = [out.shape[2:] for out in model(torch.randn(2, 1, 28, 28))]
    assert model.out_strides == (1, 4)
    assert [tuple(shape) for shape in shapes] == [(28, 28), (7, 7)]


def kinds(model, kind):
    return [name for name, m in model.named_modules() if isinstance(m, kind)]


def test_what_is_dynamic():
    """All but depth-wise convolutions with a stride, and SE."""
    model = tiny()
    plain = kinds(model, nn.Conv2d)
    assert plain == [
        'stages.1.0.depthwise.conv',
        'stages.2.0.depthwise.conv',
        'stages.2.0.se.reduce',
        'stages.2.0.se.expand',
        'stages.2.1.se.reduce',
        'stages.2.1.se.expand',
    ]
    dynamic = kinds(model, DynamicConv2d)
    # Four in a bottleneck, two in a shortcut, the stem and the last 1x1.
    assert len(dynamic) == 4 * 4 + 2 * 2 + 2
    assert len(kinds(model, ExpertRouter)) == len(dynamic)
    rep = tiny(conv='rep', num_branches=2)
    assert kinds(rep, DynamicConv2d) == []
    assert kinds(rep, RepConv2d) == dynamic
    ghostnet = tiny(num_experts=1)
    assert kinds(ghostnet, (DynamicConv2d, RepConv2d)) == []
    assert set(dynamic) <= set(kinds(ghostnet, nn.Conv2d))


@pytest.mark.parametrize('routing', ['sigmoid_linear', 'softmax_mlp'])
def test_options_of_the_routing(routing):
    model = tiny(num_experts=3, routing=routing, temperature=2.5)
    for router in model.modules():
        if isinstance(router, ExpertRouter):
            assert router.fc.out_features == 3
            assert router.routing == routing
            assert router.temperature == 2.5


def test_images_of_a_batch_do_not_meet():
    model = tiny().eval()
    x = torch.randn(3, 3, 32, 32)
    (together,) = model(x)
    alone = torch.cat([model(image[None])[0] for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_branches_vanish():
    model = tiny(conv='rep').double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)[0]
    reparameterize(model)
    assert kinds(model, RepConv2d) == []
    torch.testing.assert_close(model(x)[0], before)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_frozen_stages(frozen):
    model = tiny(frozen_stages=frozen).train()
    for i, part in enumerate((model.stem, *model.stages)):
        still = i <= frozen + 1 and frozen >= 0
        assert all(p.requires_grad != still for p in part.parameters()), i
        assert all(m.training != still for m in part.modules()), i
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(2, 3, 32, 32))
    changed = {k for k, v in model.named_buffers() if (v != before[k]).any()}
    assert ('stem.norm.running_mean' in changed) == (frozen < 0)
    assert ('stages.3.0.norm.running_mean' in changed) == (frozen < 3)


def test_norm_eval():
    model = tiny(norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_checkpointing_changes_nothing():
    x = torch.randn(2, 3, 32, 32)
    results = []
    for with_cp in (False, True):
        model = tiny(with_cp=with_cp, norm_eval=True).train()
        model(x)[0].square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, plain)


def test_norm_and_activation():
    model = tiny(norm_cfg=dict(type='SyncBN'), act_cfg=dict(type='ReLU'))
    assert len(kinds(model, nn.SyncBatchNorm)) > 10
    assert kinds(model, nn.BatchNorm2d) == []
    assert kinds(model, nn.Hardswish) == []
    assert kinds(model, nn.ReLU)


def test_width_replaces_that_of_the_arch():
    assert ParameterNet(TINY, width=1.0).out_channels == (120,)
    assert TINY['width'] == 0.5


def block(*row):
    return dict(arch=dict(rows=[[row]]))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='900m'), "arch='900m' is none of"),
        (dict(arch=[]), 'arch=.* is none of'),
        (dict(arch=dict(width=1)), 'arch=.*must have rows'),
        (dict(arch=dict(rows=[])), 'arch=.*must have rows'),
        (dict(arch=dict(rows=[[]])), 'arch=.*must have rows'),
        (dict(arch=dict(rows=[[(3, 16, 16)]])), 'arch: rows with the block'),
        (block(2, 16, 16, 0, 1), 'kernel size 2 must be odd'),
        (block(3, 0, 16, 0, 1), 'expanded channels must be above 0'),
        (block(3, 16, -4, 0, 1), 'out channels must be above 0'),
        (block(3, 16, 16, 2, 1), 'squeeze ratio must be from 0 to 1'),
        (block(3, 16, 16, 0, 0), 'stride must be at least 1'),
        (dict(width=-1), 'width=-1 must be positive'),
        (dict(width=0), 'width=0 must be positive'),
        (dict(width='wide'), "width='wide' must be a finite number"),
        (dict(conv='dense'), "conv='dense' must be one of"),
        (dict(num_experts=0), 'num_experts=0 must be a whole number'),
        (dict(num_experts=1.5), 'num_experts=1.5 must be a whole number'),
        (dict(temperature=-1), 'temperature=-1 must be positive'),
        (dict(conv='rep', num_branches=-1), 'num_branches=-1'),
        (dict(in_channels=0), 'in_channels=0 must be a whole number'),
        (dict(stem_stride=0), 'stem_stride=0 must be a whole number'),
        (dict(out_indices=(4,)), 'out_indices=.*stages from 0 to 3'),
        (dict(out_indices=()), 'out_indices=.*stages from 0 to 3'),
        (dict(out_indices=2), 'out_indices=2 must be stages'),
        (dict(frozen_stages=4), 'frozen_stages=4 must be from -1 to 3'),
        (dict(frozen_stages=None), 'frozen_stages=None must be from -1'),
        (dict(routing='top'), "routing='top' must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ParameterNet(**{'arch': TINY, **options})


def test_make_divisible():
    assert [make_divisible(v) for v in (1, 5, 30.4, 45.6, 319)] == [
        4, 8, 32, 44, 320
    ]  # fmt: skip
    # 8 would be more than a tenth less than 9.
    assert make_divisible(9) == 12


def test_ghost_module_of_an_odd_width():
    def conv(cin, cout, kernel, stride, groups):
        return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)

    module = GhostModule(4, 7, conv, dict(type='BN'))
    assert module.primary.conv.out_channels == 4
    assert module(torch.randn(2, 4, 5, 5)).shape == (2, 7, 5, 5)
