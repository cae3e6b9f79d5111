"""Linear layers that MKL has packed, and mixing with them."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    generated_mixing,
    packed_linear,
)
from lors_plugin.ops.packed_linear import PackedLinear, can_pack, widen

pytestmark = pytest.mark.usefixtures('cpu_program')

B, N, G, P, C, Q, D = 2, 5, 2, 6, 8, 7, 9


@pytest.fixture
def needs_mkl():
    refusal = packed_linear.packing_refusal()
    if refusal:
        pytest.skip(refusal)


@pytest.fixture
def no_mkl(monkeypatch):
    monkeypatch.setattr(packed_linear, 'packing_refusal', lambda: 'a test')


@pytest.mark.usefixtures('needs_mkl')
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('sizes', [(1, 1, 1), (5, 3, 7), (200, 256, 300)])
def test_is_a_linear_layer(sizes, bias):
    rows, inputs, outputs = sizes
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if bias else None
    layer = PackedLinear(weight.T.contiguous().T, bias, rows)
    assert layer.out_features == outputs
    given = x if bias is None else widen(x)
    assert_close(layer(given), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures('needs_mkl')
@pytest.mark.parametrize('shape', [(4, 4), (6, 4), (5, 3), (5, 5), (1, 5, 4)])
def test_other_shapes_are_refused(shape):
    layer = PackedLinear(torch.randn(2, 3), torch.randn(2), 5)
    with pytest.raises(ValueError, match=r'x of shape \(5, 4\), got'):
        layer(torch.randn(shape))


@pytest.mark.usefixtures('needs_mkl')
def test_what_can_be_packed():
    weight = torch.randn(2, 3)
    assert can_pack(weight, 1)
    assert not can_pack(weight, 0)
    assert not can_pack(weight.double(), 1)
    assert not can_pack(weight.bfloat16(), 1)
    assert not can_pack(weight.to('meta'), 1)
    with FlopCounterMode(display=False):
        assert not can_pack(weight, 1)


def test_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: False)
    packed_linear.packing_refusal.cache_clear()
    try:
        assert 'MKL' in packed_linear.packing_refusal()
        assert not can_pack(torch.randn(2, 3), 1)
    finally:
        packed_linear.packing_refusal.cache_clear()


def test_operators_that_changed_are_refused(monkeypatch):
    def wrong(self, x):
        return torch.zeros(4, 2)

    def missing(self, x):
        raise AttributeError('no operator _mkl_linear')

    for function, match in ((wrong, 'something else'), (missing, 'missing')):
        monkeypatch.setattr(PackedLinear, '__call__', function)
        packed_linear.packing_refusal.cache_clear()
        try:
            assert match in packed_linear.packing_refusal()
        finally:
            packed_linear.packing_refusal.cache_clear()


def inputs(bias=True, sides=True, queries=N):
    torch.manual_seed(0)
    shapes = (B, queries, G, P, C), (B, queries, D), (G * (C * C + Q * P), D)
    tensors = [torch.randn(shape) for shape in shapes]
    tensors.append(torch.randn(len(tensors[2])) if bias else None)
    for rows, cols in ((C, C), (Q, P)) if sides else ():
        tensors += [
            torch.randn(G, 2, rows, 3),
            torch.randn(B, queries, G, 2, 3, 3),
            torch.randn(G, 2, 3, cols),
        ]
    return [t if t is None else t.requires_grad_() for t in tensors]


def calls(tensors, sums):
    """Three calls, each with what the one before gave."""
    x, state, weight, bias, *parts = tensors
    parts = [LowRank(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    outs = []
    for _ in range(3):
        out = generated_mixing(
            x, state, weight, bias, *parts, gradient_sum=sums
        )
        outs.append(out)
        state = state + 0.1 * out.flatten(2)[..., :D]
    return outs


def results(tensors, sums):
    outs = calls(tensors, sums)
    torch.manual_seed(1)
    leaves = [t for t in tensors if t is not None]
    upstream = [torch.randn_like(out) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, upstream)]


OPTIONS = [{}, dict(bias=False), dict(sides=False), dict(queries=0)]


@pytest.fixture
def packs(monkeypatch):
    """Counts what is packed."""
    made = []
    build = PackedLinear.__init__

    def counted(self, *args):
        made.append(self)
        build(self, *args)

    packed_linear.packing_refusal()  # packs a layer of its own
    monkeypatch.setattr(PackedLinear, '__init__', counted)
    return made


@pytest.mark.usefixtures('needs_mkl')
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_packed_for_a_pass(options, packs):
    """One layer for each group and kind, the numbers of plain products."""
    tensors = inputs(**options)
    wanted = results(tensors, None)
    assert not packs
    assert_close(results(tensors, GradientSum()), wanted, atol=1e-4, rtol=1e-4)
    assert len(packs) == (0 if options.get('queries') == 0 else 2 * G)


@pytest.mark.usefixtures('no_mkl')
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_not_packed_where_that_is_not_possible(options, packs):
    tensors = inputs(**options)
    wanted = results(tensors, None)
    assert_close(results(tensors, GradientSum()), wanted, atol=1e-4, rtol=1e-4)
    assert not packs


@pytest.mark.usefixtures('needs_mkl')
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_inference(options, packs):
    tensors = inputs(**options)
    wanted = calls(tensors, None)
    with torch.no_grad():
        found = calls(tensors, GradientSum())
    assert_close(found, [out.detach() for out in wanted], atol=1e-4, rtol=1e-4)
    assert len(packs) == (0 if options.get('queries') == 0 else 2 * G)


@pytest.mark.usefixtures('needs_mkl')
@pytest.mark.parametrize('index', [0, 1, 2, 3, 4, 5, 9])
def test_frozen_inputs(index):
    """Adapters freeze the generator, its bias or factors."""
    tensors = inputs()
    tensors[index].requires_grad_(False)
    leaves = [t for t in tensors if t.requires_grad]
    found, wanted = (
        torch.autograd.grad(calls(tensors, sums)[-1].square().sum(), leaves)
        for sums in (GradientSum(), None)
    )
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures('needs_mkl')
def test_other_numbers_of_queries_in_one_pass(packs):
    sums = GradientSum()
    for queries in (3, 4, 3):
        tensors = inputs(queries=queries)
        with torch.no_grad():
            found = calls(tensors, sums)
            wanted = calls(tensors, None)
        assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert len(packs) == 2 * 2 * G


def test_who_saves_memory_packs_nothing(packs):
    tensors = inputs()
    results(tensors, GradientSum(save_memory=True))
    assert not packs


@pytest.mark.usefixtures('needs_mkl')
def test_a_weight_that_changes_counts_in_the_next_pass():
    """Also where a version counter does not see it."""
    tensors = inputs()
    with torch.no_grad():
        calls(tensors, GradientSum())
        tensors[2].data.mul_(-1)
        found = calls(tensors, GradientSum())
        assert_close(found, calls(tensors, None), atol=1e-4, rtol=1e-4)
