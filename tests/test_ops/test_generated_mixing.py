"""Generator and mixing in one operator: the same numbers, other layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.ops import LowRank, adaptive_mixing, generated_mixing
from lors_plugin.ops.adaptive_mixing import fused
from lors_plugin.ops.adaptive_mixing.op import (
    generated_backward,
    generated_forward,
)

pytestmark = pytest.mark.usefixtures('cpu_program')

B, N, G, P, C, Q, D = 2, 3, 2, 5, 4, 6, 7
SIDES = {
    'none': (None, None),
    'both': ((2, 3), (1, 2)),
    'channel': ((2, 3), None),
    'spatial': (None, (1, 2)),
}


def make(sides, dtype=torch.float32, queries=N, bias=True):
    """Inputs of the operator: ten, None for absent ones."""
    rows = G * (C * C + Q * P)
    shapes = [
        (B, queries, G, P, C),
        (B, queries, D),
        (rows, D),
        (rows,) if bias else None,
    ]
    for side, rows, cols in zip(SIDES[sides], (C, Q), (C, P)):
        if side is None:
            shapes += [None] * 3
        else:
            k, r = side
            shapes += [
                (G, k, rows, r),
                (B, queries, G, k, r, r),
                (G, k, r, cols),
            ]
    torch.manual_seed(0)
    return [
        None if s is None else torch.randn(s, dtype=dtype).requires_grad_()
        for s in shapes
    ]


def parts_of(factors):
    return [
        None if factors[i] is None else LowRank(*factors[i : i + 3])
        for i in (0, 3)
    ]


def call(tensors, backend='torch'):
    x, query, weight, bias, *factors = tensors
    parts = parts_of(factors)
    return generated_mixing(x, query, weight, bias, *parts, backend=backend)


def two_steps(tensors, backend='reference'):
    x, query, weight, bias, *factors = tensors
    weights = F.linear(query, weight, bias).unflatten(-1, (G, -1))
    return adaptive_mixing(x, weights, *parts_of(factors), backend=backend)


def grads_of(function, tensors, upstream):
    given = [t for t in tensors if t is not None]
    out = function(tensors)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('sides', SIDES)
def test_equals_the_two_steps(sides, bias):
    tensors = make(sides, torch.float64, bias=bias)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = grads_of(two_steps, tensors, upstream)
    assert_close(grads_of(call, tensors, upstream), wanted)
    assert_close(
        grads_of(lambda t: call(t, 'reference'), tensors, upstream), wanted
    )


def test_paper_sizes_in_float32():
    torch.manual_seed(0)
    x, query = torch.randn(1, 9, 2, 64, 128), torch.randn(1, 9, 32)
    weight = 0.1 * torch.randn(2 * (128**2 + 128 * 64), 32)
    tensors = [x, query, weight, None, *[None] * 6]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    upstream = torch.randn(1, 9, 2, 128, 128)

    def grads(function):
        out = function()
        return out, *torch.autograd.grad(out, tensors[:3], upstream)

    wide = [t.detach().double().requires_grad_() for t in tensors[:3]]
    out = generated_mixing(*wide, backend='reference')
    wanted = out, *torch.autograd.grad(out, wide, upstream.double())
    have = grads(lambda: call(tensors))
    for value, right in zip(have, wanted):
        error = (value - right).abs().max() / right.abs().max()
        assert error < 1e-5


@pytest.mark.parametrize('queries', [1, 4])
def test_chunks_do_not_matter(queries, monkeypatch):
    tensors = make('both', torch.float64)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = grads_of(call, tensors, upstream)
    numbers = P * C + C * C + Q * P
    monkeypatch.setattr(fused, 'MOST_THREADS', 1)
    monkeypatch.setattr(fused, 'CHUNK_BYTES', queries * numbers * 8)
    assert_close(grads_of(call, tensors, upstream), wanted)


def test_no_queries():
    tensors = make('both', queries=0)
    upstream = torch.randn(B, 0, G, Q, C)
    out, *grads = grads_of(call, tensors, upstream)
    assert out.shape == (B, 0, G, Q, C)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize('order', [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_features_in_any_order(order):
    tensors = make('both', torch.float64)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = grads_of(call, tensors, upstream)
    x = tensors[0].detach().permute(*order, 3, 4).contiguous()
    back = [order.index(i) for i in range(3)]
    tensors[0] = x.permute(*back, 3, 4).requires_grad_()
    assert_close(grads_of(call, tensors, upstream), wanted)


def test_inputs_with_gaps():
    tensors = make('both', torch.float64)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = grads_of(call, tensors, upstream)
    gaps = [
        t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach()
        for t in tensors
    ]
    for tensor in gaps:
        tensor.requires_grad_()
    turned = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(grads_of(call, gaps, turned), wanted)


@pytest.mark.parametrize('sides', SIDES)
def test_opcheck(sides):
    tensors = make(sides)
    torch.library.opcheck(generated_forward, (*tensors, 1e-5))
    given = [None if t is None else t.detach() for t in tensors]
    out, *kept = generated_forward(*given, 1e-5)
    x, query, weight, bias, *factors = given
    torch.library.opcheck(
        generated_backward,
        (
            torch.randn_like(out),
            x,
            query,
            weight,
            bias,
            True,
            True,
            *factors,
            out,
            *kept,
            1e-5,
        ),
    )


def test_compiles_without_graph_break():
    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    for queries in (3, 5):
        tensors = make('both', queries=queries)
        upstream = torch.randn(B, queries, G, Q, C)
        assert_close(
            grads_of(compiled, tensors, upstream),
            grads_of(call, tensors, upstream),
        )


@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_autocast(backend):
    """Products in the type of autocast, as the two steps have them."""
    tensors = make('both')
    with torch.autocast('cpu', torch.bfloat16):
        have, wanted = call(tensors, backend), two_steps(tensors)
    assert have.dtype == wanted.dtype == torch.bfloat16
    exact = two_steps([t.double() for t in tensors])
    error = (have - exact).norm()
    assert error <= 2 * (wanted - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize('index', [0, 1])
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_mixed_types_promote(index, backend):
    tensors = make('none')
    tensors[index] = tensors[index].detach().bfloat16()
    assert call(tensors, backend).dtype == torch.float32


@pytest.mark.parametrize('frozen', [(1,), (2, 3), (1, 2, 3), (0,), (3,)])
def test_gradients_that_nobody_needs(frozen):
    tensors = make('both', torch.float64)
    for index in frozen:
        tensors[index].requires_grad_(False)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    given = [t for t in tensors if t.requires_grad]
    have = torch.autograd.grad(call(tensors), given, upstream)
    wanted = torch.autograd.grad(two_steps(tensors), given, upstream)
    assert_close(have, wanted)


def test_opcheck_of_inputs_with_gaps():
    tensors = make('both')
    gaps = [
        t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t
        for t in tensors
    ]
    torch.library.opcheck(generated_forward, (*gaps, 1e-5))
    x, query, weight, _, *factors = [t.detach() for t in gaps]
    out, *kept = generated_forward(x, query, weight, None, *factors, 1e-5)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            generated_backward,
            (
                torch.randn_like(out),
                x,
                query.transpose(0, 1).contiguous().transpose(0, 1),
                weight,
                None,
                *needs,
                *factors,
                out,
                *kept,
                1e-5,
            ),
        )


def test_compiles_to_machine_code():
    """Inductor relies on the strides that the operators announce."""
    tensors = make('channel')
    tensors[1] = torch.randn(N, B, D).transpose(0, 1).requires_grad_()
    compiled = torch.compile(call, fullgraph=True)
    upstream = torch.randn(B, N, G, Q, C)
    assert_close(
        grads_of(compiled, tensors, upstream),
        grads_of(call, tensors, upstream),
    )


@pytest.mark.parametrize(
    ('index', 'shape', 'match'),
    [
        (0, (B, N, G, P * C), 'x must have shape'),
        (1, (B, N + 1, D), r"query must have shape \(2, 3, 'D'\)"),
        (2, (G * (C * C + Q * P) + 1, D), 'weight must have shape'),
        (2, (G * (C * C + Q * P), D + 1), 'weight must have shape'),
        (2, (G * C * C, D), 'weight must have shape'),
        (3, (3,), r'bias must have shape \(92,\), got \(3,\)'),
        (5, (B, N, G, 1, 3, 3), 'channel_low_rank.core must have'),
        (7, (G, 1, Q + 1, 2), 'spatial_low_rank.left must have'),
    ],
)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_wrong_shapes(index, shape, match, backend):
    tensors = make('both')
    tensors[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=match):
        call(tensors, backend)
