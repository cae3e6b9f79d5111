"""Inference with norms in the convolutions does what the modules do."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.models.backbones import ParameterNet, folding, parameternet
from lors_plugin.models.backbones.ghost import ConvNorm, plain_conv
from lors_plugin.models.layers import DynamicConv2d
from lors_plugin.ops.dynamic_conv import side_by_side
from lors_plugin.testing import randomize

TINY = dict(
    width=0.5,
    rows=[
        [(3, 16, 16, 0, 1)],
        [(3, 50, 22, 0, 2)],
        [(5, 72, 40, 0.25, 2), (3, 120, 40, 0.25, 1)],
    ],
)


def tiny(dtype=torch.float64, **options):
    """A model whose norms have seen images, so that results depend on x."""
    model = randomize(ParameterNet(TINY, out_indices=(1, -1), **options))
    model = model.to(dtype).train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(4, 3, 32, 32, dtype=dtype))
    return model.eval()


def both_ways(model, x):
    """With gradients, which nothing folds, and without."""
    slow = [out.detach() for out in model(x)]
    with torch.no_grad():
        return slow, model(x)


@pytest.fixture
def folded(monkeypatch):
    """How many convolutions were folded."""
    calls = []
    plain = folding.fold

    def counted(*given):
        calls.append(given)
        return plain(*given)

    monkeypatch.setattr('lors_plugin.models.backbones.ghost.fold', counted)
    return calls


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('num_experts', [1, 4])
def test_whole_network(batch, num_experts, folded):
    model = tiny(num_experts=num_experts)
    x = torch.randn(batch, 3, 32, 28, dtype=torch.float64)
    slow, fast = both_ways(model, x)
    assert len(folded) == sum(isinstance(m, ConvNorm) for m in model.modules())
    for wanted, found in zip(slow, fast):
        assert found.is_contiguous()
        assert batch == 1 or wanted.std(0).mean() > 1e-3
        assert_close(found, wanted)


@pytest.mark.parametrize('memory', ['contiguous_format', 'channels_last'])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(
    ('kernel', 'groups'), [(1, 1), (3, 1), (3, 6), (3, 2), (1, 6)]
)
@pytest.mark.parametrize('experts', [0, 1, 3])
def test_one_layer(experts, kernel, groups, bias, stride, memory):
    options = dict(
        stride=stride, padding=kernel // 2, groups=groups, bias=bias
    )
    if experts:
        conv = DynamicConv2d(6, 6, kernel, num_experts=experts, **options)
    else:
        conv = nn.Conv2d(6, 6, kernel, **options)
    layer = randomize(ConvNorm(conv, 6, dict(type='BN'))).double().eval()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=getattr(torch, memory))
    wanted = layer(x).detach()
    with torch.no_grad():
        assert_close(layer(x), wanted)
        assert_close(layer(side_by_side.lay(x)), wanted)


def test_a_batch_in_pieces(monkeypatch):
    model = tiny()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(parameternet, 'PIECE', 2 * 32 * 32)
    sizes = []
    stem = model._compute
    monkeypatch.setattr(
        model,
        '_compute',
        lambda piece: sizes.append(len(piece)) or stem(piece),
    )
    slow, fast = both_ways(model, x)
    assert sizes == [5, 2, 2, 1]
    for wanted, found in zip(slow, fast):
        assert found.is_contiguous()
        assert_close(found, wanted)
    # Who watches a part sees the batch as it came.
    seen = []
    model.stages[1][0].register_forward_hook(
        lambda module, given, out: seen.append(len(out))
    )
    assert_close(both_ways(model, x)[1][0], slow[0])
    assert seen == [5, 5]


def test_weights_and_statistics_may_change():
    model = tiny()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    both_ways(model, x)
    with torch.no_grad():
        model.stem.norm.running_mean.data.add_(1)
        model.stages[0][0].expand.cheap.conv.weight.data.mul_(2)
        model.train()(x)
    slow, fast = both_ways(model.eval(), x)
    assert_close(fast[1], slow[1])


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.norm.train(),
        lambda layer: layer.conv.register_forward_hook(lambda *_: None),
        lambda layer: layer.norm.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.conv, 'forward', layer.conv.forward),
        lambda layer: setattr(layer.conv, 'padding_mode', 'reflect'),
        lambda layer: setattr(layer, 'norm', nn.GroupNorm(2, 4)),
        lambda layer: setattr(layer, 'norm', nn.Identity()),
        lambda layer: layer.half(),
    ],
    ids=[
        'batch',
        'hook',
        'prehook',
        'patch',
        'padding',
        'group',
        'none',
        'half',
    ],
)
def test_what_is_left_to_the_modules(change):
    layer = ConvNorm(plain_conv(4, 4, 3, 1, 4), 4, dict(type='BN')).eval()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert folding.can_fold(layer.conv, layer.norm, x)
        change(layer)
        x = x.to(layer.conv.weight.dtype)
        assert not folding.can_fold(layer.conv, layer.norm, x)


def test_where_nothing_is_folded(monkeypatch):
    layer = ConvNorm(DynamicConv2d(4, 4, 1), 4, dict(type='BN')).eval()
    pair, x = (layer.conv, layer.norm), torch.randn(2, 4, 5, 5)
    assert not folding.can_fold(*pair, x)  # with gradients
    with torch.no_grad():
        assert folding.can_fold(*pair, x)
        with torch.autocast('cpu', torch.bfloat16):
            assert not folding.can_fold(*pair, x)
        assert not folding.can_fold(*pair, nn.Parameter(x))
        assert not folding.can_fold(*pair, x[:0])
        assert not folding.can_fold(*pair, x.to('meta'))
        monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'reference')
        assert not folding.can_fold(*pair, x)


def test_traced_and_exported_graphs_have_the_modules():
    model = tiny(torch.float32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert_close(
            traced(x[:1].expand(2, -1, -1, -1))[1],
            model(x[:1].expand(2, -1, -1, -1))[1],
            rtol=1e-3,
            atol=1e-4,
        )
    assert 'batch_norm' in str(traced.inlined_graph)
