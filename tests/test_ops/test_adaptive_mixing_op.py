"""Adaptive mixing as a registered operator, and its way through chunks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.ops import LowRank, adaptive_mixing
from lors_plugin.ops.adaptive_mixing import fused
from lors_plugin.ops.adaptive_mixing.op import mixing_backward, mixing_forward

pytestmark = pytest.mark.usefixtures('cpu_program')

B, N, G, P, C, Q = 2, 3, 2, 5, 4, 6
# Which sides have low-rank parts, as (K, r).
SIDES = {
    'none': (None, None),
    'both': ((2, 3), (1, 2)),
    'channel': ((2, 3), None),
    'spatial': (None, (1, 2)),
}


def make(sides, dtype=torch.float32, queries=N):
    """Inputs of the operator: eight, None for absent factors."""
    shapes = [(B, queries, G, P, C), (B, queries, G, C * C + Q * P)]
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
    return [
        None if s is None else torch.randn(s, dtype=dtype).requires_grad_()
        for s in shapes
    ]


def call(tensors, backend='torch'):
    x, weights, *rest = tensors
    parts = [
        None if rest[i] is None else LowRank(*rest[i : i + 3]) for i in (0, 3)
    ]
    return adaptive_mixing(x, weights, *parts, backend=backend)


def grads_of(function, tensors, upstream):
    given = [t for t in tensors if t is not None]
    out = function(tensors)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


@pytest.mark.parametrize(
    ('sides', 'dtype'),
    [
        *((sides, torch.float32) for sides in SIDES),
        ('both', torch.bfloat16),
    ],
)
def test_opcheck(sides, dtype):
    tensors = make(sides, dtype)
    torch.library.opcheck(mixing_forward, (*tensors, 1e-5, 'torch'))
    with torch.no_grad():
        out, stats = mixing_forward(*tensors, 1e-5, 'torch')
    given = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(
        mixing_backward,
        (torch.randn_like(out), *given, stats, 1e-5, 'torch'),
    )


def test_opcheck_of_inputs_with_gaps():
    tensors = [t.detach().mT.contiguous().mT for t in make('both')]
    out, stats = mixing_forward(*tensors, 1e-5, 'torch')
    torch.library.opcheck(
        mixing_backward,
        (torch.randn_like(out), *tensors, stats, 1e-5, 'torch'),
    )


@pytest.mark.parametrize('sides', SIDES)
def test_chunks_do_not_matter(sides, monkeypatch):
    """Four queries a chunk, the last with fewer; and one."""
    tensors = make(sides, torch.float64)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = grads_of(call, tensors, upstream)
    numbers = P * C + C * C + Q * P
    monkeypatch.setattr(fused, 'MOST_THREADS', 1)
    for queries in (4, 1):
        monkeypatch.setattr(fused, 'CHUNK_BYTES', queries * numbers * 8)
        assert fused._chunk_size(tensors[0], Q) == queries
        assert_close(grads_of(call, tensors, upstream), wanted)


@pytest.mark.parametrize('scale', [1.0, 1e-3, 0.0])
def test_statistics(scale):
    """Of both norms, also where eps is most of a variance."""
    x, weights, *none = make('none')
    x = scale * x
    _, stats = mixing_forward(x, weights, *none, 1e-5, 'torch')
    y = x @ weights[..., : C * C].unflatten(-1, (C, C))
    z = weights[..., C * C :].unflatten(-1, (Q, P)) @ F.relu(
        F.layer_norm(y, y.shape[-2:])
    )
    assert stats.dtype == torch.float32
    for product, found in zip((y, z), stats.split(2, -1)):
        flat = product.flatten(-2)
        variance = flat.var(-1, correction=0)
        assert_close(found[..., 0], flat.mean(-1))
        assert_close(found[..., 1], (variance + 1e-5).rsqrt())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_wide_for_narrow_products(dtype):
    x, weights, *none = make('none', dtype)
    out, stats = mixing_forward(x, weights, *none, 1e-5, 'torch')
    assert out.dtype == dtype
    assert stats.dtype == torch.float32
    # More digits than the type of the products has.
    assert (stats != stats.to(dtype)).any()


def test_large_mean_and_small_deviation():
    """Mean 100 and deviation 0.1 of the first product."""
    torch.manual_seed(1)
    x = 100 + 0.1 * torch.randn(2, 3, 1, 64, 16)
    weights = torch.cat(
        [
            torch.eye(16).flatten().expand(2, 3, 1, -1),
            torch.randn(2, 3, 1, 64),
        ],
        -1,
    )
    wanted = adaptive_mixing(x.double(), weights.double())
    for backend in ('torch', 'reference'):
        have = adaptive_mixing(x, weights, backend=backend)
        error = (have - wanted).norm() / wanted.norm()
        assert error < 1e-3, backend


@pytest.mark.parametrize('sides', ['both', 'none'])
def test_compiles_without_graph_break(sides):
    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    for queries in (3, 5, 4):
        tensors = make(sides, queries=queries)
        upstream = torch.randn(B, queries, G, Q, C)
        assert_close(
            grads_of(compiled, tensors, upstream),
            grads_of(call, tensors, upstream),
        )


def test_compiles_with_dynamic_shapes():
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(
        call, fullgraph=True, backend=backend, dynamic=True
    )
    # Sizes that are equal by chance count as equal for the compiler.
    for queries in (7, 9):
        tensors = make('both', queries=queries)
        assert_close(compiled(tensors), call(tensors))
    assert count == 1


def test_expanded_gradient():
    """What `sum` sends back has strides of zero."""
    tensors = make('both', torch.float64)
    wanted = grads_of(
        lambda t: call(t, 'reference').sum(), tensors, torch.ones(()).double()
    )
    have = grads_of(lambda t: call(t).sum(), tensors, torch.ones(()).double())
    assert_close(have, wanted)


def test_only_some_inputs_need_gradients():
    tensors = make('both', torch.float64)
    upstream = torch.randn(B, N, G, Q, C, dtype=torch.float64)
    wanted = torch.autograd.grad(call(tensors), tensors[1], upstream)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == 1)
    assert_close(
        torch.autograd.grad(call(tensors), tensors[1], upstream), wanted
    )


def test_second_derivatives_are_refused():
    x, weights, *none = make('none')
    out = call([x, weights, *none])
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='adaptive_mixing_backward'):
        grad.sum().backward()


def test_is_deterministic_and_leaves_its_inputs_alone():
    tensors = make('both')
    before = copy.deepcopy(tensors)
    upstream = torch.randn(B, N, G, Q, C)
    first = grads_of(call, tensors, upstream)
    assert_close(grads_of(call, tensors, upstream), first, rtol=0, atol=0)
    assert_close(tensors, before, rtol=0, atol=0)


def test_keeps_inputs_and_statistics_only():
    tensors = make('both')
    known = {t.data_ptr() for t in tensors}
    new = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            new.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(tensors)
    assert [tuple(t.shape) for t in new] == [(B, N, G, 4)]
