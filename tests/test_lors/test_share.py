"""Which layers share, what they become, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from lors_plugin.adapters import inject_adapters
from lors_plugin.lors import LowRankResidualLinear, share_stack

QKV = r'layers\.(\d+)\.qkv'
FFN = r'layers\.(\d+)\.ffn'


class Model(nn.Module):
    def __init__(self, depth=11):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                dict(qkv=nn.Linear(6, 12), ffn=nn.Linear(6, 6, bias=False))
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            q, k = layer['qkv'](x).chunk(2, -1)
            x = x + layer['ffn'](q * k.sigmoid())
        return self.head(x)


def test_layers_are_numbered_not_sorted_as_text():
    model = Model()
    report = share_stack(model, [QKV], ranks=list(range(1, 7)) + [1] * 5)
    ranks = [layer['qkv'].rank for layer in model.layers]
    assert ranks == [1, 2, 3, 4, 5, 6, 1, 1, 1, 1, 1]
    assert report.stacks[0].names[2] == 'layers.2.qkv'
    assert model.layers[0]['qkv'].owner is model.layers[0]['qkv']
    assert type(model.layers[0]['ffn']) is nn.Linear


def test_counts():
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    report = share_stack(
        model,
        [QKV, dict(pattern=FFN, ranks=1, groups=[2] + 10 * [1])],
        ranks=[0, *[2] * 10],
    )
    assert report.before == 11 * (72 + 36)
    assert report.after == 72 + 18 * 20 + 36 + 12 * 12
    now = sum(p.numel() for p in model.parameters())
    assert now - total == report.after - report.before
    table = report.table().splitlines()
    assert table[1].split() == ['layers.0.qkv', '11', '792', '432', '-']
    assert table[-1].split() == ['all', '1,188', '612']


def test_earlier_groups_tell_stacks_apart():
    model = nn.ModuleList(
        nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        for width in (4, 8)
    )
    report = share_stack(model, [r'(\d)\.(\d)'], ranks=1)
    assert [s.names for s in report.stacks] == [['0.0', '0.1'], ['1.0', '1.1']]
    assert model[1][1].shared.shape == (8, 8)


def test_every_other_layer_shares():
    model = Model(5)
    report = share_stack(model, [QKV], ranks=1, cycle=2)
    assert [s.names for s in report.stacks] == [
        [f'layers.{i}.qkv' for i in numbers] for numbers in ((0, 2, 4), (1, 3))
    ]
    owners = [layer['qkv'].owner for layer in model.layers]
    assert owners[4] is owners[0] is model.layers[0]['qkv']
    assert owners[3] is owners[1] is model.layers[1]['qkv']


def test_part_of_a_model():
    model = nn.ModuleDict(dict(backbone=Model(3), other=Model(3)))
    share_stack(model, [QKV], ranks=1, module='backbone')
    shared = [
        name
        for name, m in model.named_modules()
        if isinstance(m, LowRankResidualLinear)
    ]
    assert shared == [f'backbone.layers.{i}.qkv' for i in range(3)]


def test_svd_keeps_the_function():
    model = Model()
    x = torch.randn(2, 6)
    wanted = model(x)
    low = copy.deepcopy(model)
    report = share_stack(model, [QKV, FFN], ranks=6, init='svd')
    torch.testing.assert_close(model(x), wanted)
    assert max(stack.error for stack in report.stacks) < 1e-6
    lossy = share_stack(low, [QKV], ranks=2, init='svd')
    assert 0.1 < lossy.stacks[0].error < 1
    assert f'{lossy.stacks[0].error:.1%}' in lossy.table()


def test_biases_stay_and_weights_are_new():
    model = Model()
    biases = [layer['qkv'].bias for layer in model.layers]
    old = model.layers[0]['qkv'].weight
    share_stack(model, [QKV], ranks=2)
    for layer, bias in zip(model.layers, biases):
        assert layer['qkv'].bias is bias
        assert torch.equal(layer['qkv'].weight, model.layers[3]['qkv'].weight)
    assert not torch.equal(old, model.layers[0]['qkv'].weight)


def test_what_was_frozen_stays_so():
    model = Model(3)
    model.layers[1].requires_grad_(False)
    share_stack(model, [QKV], ranks=2)
    trained = {
        n for n, p in model.layers.named_parameters() if p.requires_grad
    }
    assert '0.qkv.up' in trained
    assert '0.qkv.shared_weight' not in trained
    assert not any(name.startswith('1.') for name in trained)
    for layer in model.layers:
        layer.requires_grad_(True)
    share_stack(model, [FFN], ranks=2)
    assert model.layers[0]['ffn'].shared_weight.requires_grad


def test_a_layer_at_two_places():
    model = nn.ModuleDict(dict(a=Model(2), b=nn.ModuleList()))
    model['b'].append(model['a'].layers[1]['qkv'])
    share_stack(model, [QKV], ranks=1, module='a')
    assert model['b'][0] is model['a'].layers[1]['qkv']
    assert isinstance(model['b'][0], LowRankResidualLinear)


def test_meta_device():
    with torch.device('meta'):
        model = Model(2)
    with pytest.raises(ValueError, match='meta device'):
        share_stack(model, [QKV], ranks=1, init='svd')
    share_stack(model, [QKV], ranks=1)
    assert model.layers[1]['qkv'].down.is_meta


def adapted(model):
    inject_adapters(model, module='', targets=['layers.1.qkv'], hidden_dims=2)


def mixed(model):
    model.layers[1]['qkv'].to(torch.float64)


@pytest.mark.parametrize(
    ('options', 'change', 'message'),
    [
        (dict(targets=QKV), None, 'must be a list of patterns'),
        (dict(targets=[]), None, 'must be a list of patterns'),
        (dict(targets=[3]), None, 'target 3 must be a pattern'),
        (dict(targets=['(']), None, r"targets: '\(' is no regular expr"),
        (dict(targets=[r'layers\.\d\.qkv']), None, 'has no group'),
        (dict(targets=[r'layers\.(.*)']), None, 'last group is the number'),
        (dict(targets=[r'blocks\.(\d)']), None, r'named like .*head'),
        (dict(targets=[r'(\d)\.qkv']), None, 'found inside .*layers.0.qkv'),
        (dict(targets=[r'layers\.(1)\.qkv']), None, 'alone'),
        (
            dict(targets=[r'layers\.(\d)\.(?:qkv|ffn)']),
            None,
            'several layers of one number',
        ),
        (dict(targets=[QKV, QKV]), None, 'is matched by'),
        (dict(targets=[dict(pattern=QKV, rank=1)]), None, 'nothing else'),
        (dict(targets=[dict(ranks=1)]), None, 'it must have a pattern'),
        (dict(targets=[QKV], ranks=[1, 2]), None, 'qkv.*2 values for 3'),
        (dict(targets=[QKV], ranks=4, groups=2), None, 'rank 8.*above 6'),
        (dict(targets=[QKV], ranks=-1), None, 'at least 0'),
        (dict(targets=[QKV], init='zero'), None, "init='zero'"),
        (dict(targets=[QKV], module='neck'), None, "no part 'neck'"),
        (dict(targets=[QKV], ranks=1), adapted, 'before adding adapters'),
        (dict(targets=[QKV], ranks=1), mixed, 'torch.float64 on cpu'),
        (
            dict(targets=[QKV], ranks=1),
            lambda m: share_stack(m, [QKV], ranks=1),
            'shares its weight already',
        ),
    ],
)
def test_refused_before_anything_is_touched(options, change, message):
    model = Model(3)
    if change:
        change(model)
    before = dict(model.named_modules())
    options.setdefault('ranks', 1)
    with pytest.raises(ValueError, match=message):
        share_stack(model, **options)
    assert dict(model.named_modules()) == before


def test_a_wrong_target_leaves_those_before_it():
    model = Model(3)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match='matches no linear layer'):
        share_stack(model, [QKV, r'blocks\.(\d)'], ranks=1)
    assert dict(model.named_modules()) == before
