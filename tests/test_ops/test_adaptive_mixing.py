"""Adaptive mixing: every implementation against the formula of the papers."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lors_plugin.ops import (
    LowRank,
    adaptive_mixing,
    cpu_library,
    generated_mixing,
)
from lors_plugin.ops.adaptive_mixing import torch_impl
from lors_plugin.ops.adaptive_mixing.op import mixing_backward, mixing_forward
from lors_plugin.ops.adaptive_mixing.reference import split_weights

# B, N, G, P, C, Q, then K and r of the channel and of the spatial part.
SIZES = {
    'plain': (2, 3, 2, 8, 6, 10, None, None),
    'adamixer': (1, 2, 4, 32, 64, 128, None, None),
    'lors': (1, 2, 2, 64, 128, 128, (3, 16), (3, 16)),
    'odd': (2, 3, 2, 36, 24, 7, (2, 5), (2, 5)),
    'odd columns': (2, 3, 2, 17, 33, 19, (2, 5), (1, 3)),
    'channel part': (2, 3, 2, 5, 4, 6, (2, 3), None),
    'spatial part': (2, 3, 2, 5, 4, 6, None, (1, 2)),
    'one query': (1, 1, 3, 9, 8, 5, (1, 4), (1, 4)),
    'one group': (2, 3, 1, 4, 6, 9, (3, 2), (3, 2)),
    'one point': (1, 2, 2, 1, 4, 1, (1, 1), (1, 1)),
    'one element': (1, 2, 2, 1, 1, 1, (1, 1), (1, 1)),
    'rank 0': (1, 2, 2, 5, 4, 6, (1, 0), (2, 0)),
    'no query': (2, 0, 2, 8, 6, 10, (2, 3), (2, 3)),
    'no image': (0, 3, 2, 8, 6, 10, (1, 3), (1, 3)),
}
NAMES = ('x', 'weights', 'c_left', 'c_core', 'c_right')
NAMES += ('s_left', 's_core', 's_right')
LAYOUTS = {
    'by group': lambda t: (
        t.transpose(0, 2).contiguous().transpose(0, 2) if t.dim() > 4 else t
    ),
    'transposed': lambda t: t.mT.contiguous().mT,
    'with gaps': lambda t: torch.stack([t, t * torch.nan], -1)[..., 0],
}
CPU = [f'cpu {name}' for name in ('avx-512', 'avx2', 'baseline')]
FAST = ['torch', *CPU]


@pytest.fixture
def backend(request, monkeypatch):
    """The backend to ask for; of 'cpu avx2' the set goes to the variable."""
    name, _, instructions = request.param.partition(' ')
    if name == 'cpu':
        found = cpu_library.find_sets()
        if isinstance(found, str):
            pytest.skip(found)
        if instructions:
            running = [one.name.lower() for one in found if one.runs]
            if instructions not in running:
                pytest.skip(f'this CPU has no {instructions}')
            monkeypatch.setenv(cpu_library.ENV_NAME, instructions)
    return name


def backends(*names):
    return pytest.mark.parametrize('backend', names, indirect=True)


def make(name, dtype=torch.float64, scale=1.0, seed=0):
    """Inputs in the order of ``NAMES``, None for absent factors."""
    b, n, g, p, c, q, *ranks = SIZES[name]
    shapes = [(b, n, g, p, c), (b, n, g, c * c + q * p)]
    for part, rows, cols in zip(ranks, (c, q), (c, p)):
        k, r = part or (0, 0)
        factors = (g, k, rows, r), (b, n, g, k, r, r), (g, k, r, cols)
        shapes += factors if part else [None] * 3
    rng = torch.Generator().manual_seed(seed)
    return [
        None
        if shape is None
        else torch.randn(shape, generator=rng, dtype=torch.float64)
        .mul(scale)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def parts_of(factors):
    return [
        LowRank(*part) if part[0] is not None else None
        for part in (factors[:3], factors[3:])
    ]


def mix(tensors, backend='auto', **options):
    x, weights, *factors = tensors
    parts = parts_of(factors)
    return adaptive_mixing(x, weights, *parts, backend=backend, **options)


def run(function, tensors, dtype=None):
    """Output and gradients of all inputs, for a fixed random upstream."""
    leaves = [
        t if t is None else t.detach().to(dtype).requires_grad_()
        for t in tensors
    ]
    out = function(leaves)
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    used = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, used, upstream.to(out.dtype))
    return [out.detach(), *grads]


def error(found, wanted):
    if not wanted.numel():
        return 0.0 if found.shape == wanted.shape else float('inf')
    gap = (found.double() - wanted.double()).norm()
    return (gap / wanted.double().norm().clamp(min=1e-30)).item()


def norm_relu(x):
    """LayerNorm of one matrix, in words of the paper."""
    centred = x - x.mean()
    return (centred / (centred.square().mean() + 1e-5).sqrt()).clamp(min=0)


def formula(tensors):
    """Sections 3.2 (AdaMixer) and 3.3 (LORS), one query and group a time."""
    x, weights, *factors = tensors
    *lead, p, c = x.shape
    out = []
    for i, j, h in torch.cartesian_prod(*map(torch.arange, lead)).tolist():
        row = weights[i, j, h]
        matrices = [row[: c * c].view(c, c), row[c * c :].view(-1, p)]
        for side, (left, core, right) in enumerate((factors[:3], factors[3:])):
            for k in range(0 if left is None else left.shape[1]):
                matrices[side] = matrices[side] + torch.einsum(
                    'ar,rt,tb->ab', left[h, k], core[i, j, h, k], right[h, k]
                )
        m, s = matrices
        y = norm_relu(torch.einsum('pc,cd->pd', x[i, j, h], m))
        out.append(norm_relu(torch.einsum('qp,pd->qd', s, y)))
    return torch.stack(out).unflatten(0, lead)


@pytest.mark.parametrize(
    'name', [n for n, s in SIZES.items() if s[0] * s[1] and s[4] > 1]
)
@backends('reference', 'torch')
def test_float64_equals_the_formula(backend, name):
    tensors = make(name)
    if name in ('lors', 'adamixer'):
        tensors = [t if t is None else t / 4 for t in tensors]
    wanted = run(formula, tensors)
    assert_close(run(lambda t: mix(t, backend), tensors), wanted)


@pytest.mark.parametrize(
    ('name', 'layout'),
    [(name, 'contiguous') for name in SIZES]
    + [(n, k) for n in ('lors', 'odd', 'odd columns') for k in LAYOUTS],
)
@backends(*FAST)
def test_float32_equals_the_reference(backend, name, layout):
    tensors = make(name, torch.float32)
    wanted = run(lambda t: mix(t, 'reference'), tensors, torch.float64)
    change = LAYOUTS.get(layout, torch.clone)
    laid = [t if t is None else change(t.detach()) for t in tensors]
    found = run(lambda t: mix(t, backend), laid)
    for label, a, b in zip(('out', *NAMES), found, wanted):
        # A single element is its own mean: zero but for the rounding.
        if name != 'one element':
            assert error(a, b) < 3e-6, label
        else:
            assert a.shape == b.shape and a.abs().max() < 1e-3, label


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', ['plain', 'odd', 'one group', 'no query'])
@backends('torch')
def test_half_types_are_as_good_as_the_reference(
    backend, name, dtype, autocast
):
    """Errors against float64 at most twice those of the reference."""
    # With a seed by which no ReLU gets an input that rounds to either sign.
    tensors = make(name, torch.float32, scale=0.5, seed=3)
    exact = run(lambda t: mix(t, 'reference'), tensors, torch.float64)

    def with_type(backend):
        with torch.autocast('cpu', dtype, enabled=autocast):
            given = None if autocast else dtype
            return run(lambda t: mix(t, backend), tensors, given)

    found, reference = with_type(backend), with_type('reference')
    assert found[0].dtype == reference[0].dtype == dtype
    for label, a, r, e in zip(('out', *NAMES), found, reference, exact):
        assert a.dtype == r.dtype, label
        assert error(a, e) <= 2 * error(r, e) + 1e-3, label


def generate(tensors, backend='auto', recompute=False):
    x, query, weight, bias, *factors = tensors
    return generated_mixing(
        *(x, query, weight, bias, *parts_of(factors)),
        backend=backend,
        recompute=recompute,
    )


def two_steps(tensors):
    x, query, weight, bias, *factors = tensors
    weights = F.linear(query, weight, bias).unflatten(-1, (x.shape[2], -1))
    return mix([x, weights, *factors], 'reference')


def with_generator(name, dtype=torch.float64, bias=True, width=7):
    x, weights, *factors = make(name, dtype)
    rows = weights.shape[2] * weights.shape[3]
    rng = torch.Generator().manual_seed(2)
    shapes = (*x.shape[:2], width), (rows, width), (rows,)
    query, weight, shift = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for shape in shapes
    )
    return [x, query, weight, shift if bias else None, *factors]


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('name', ['plain', 'odd', 'spatial part', 'no query'])
@backends('reference', 'torch', 'cpu')
def test_generated_mixing(backend, name, bias, recompute):
    tensors = with_generator(name, torch.float32, bias)
    wanted = run(two_steps, tensors, torch.float64)
    found = run(lambda t: generate(t, backend, recompute), tensors)
    assert max(map(error, found, wanted)) < 5e-6


@pytest.mark.parametrize('recompute', [False, True])
def test_what_is_kept_for_backward(recompute):
    """Inputs, statistics and the generated matrices, or the inputs alone."""
    tensors = with_generator('odd', torch.float32)
    known = {t.data_ptr() for t in tensors if t is not None}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        generate([t.requires_grad_() for t in tensors], recompute=recompute)
    b, n, g, p, c, q, *_ = SIZES['odd']
    generated, stats = b * n * g * (c * c + q * p), b * n * g * 4
    assert sorted(kept.values()) == (
        [] if recompute else [4 * stats, 4 * generated]
    )


def test_mixed_types_promote():
    for index in (0, 1):
        tensors = make('plain', torch.float32)
        tensors[index] = tensors[index].detach().bfloat16()
        assert mix(tensors).dtype == torch.float32
    tensors[0] = tensors[0].double()
    with torch.autocast('cpu', torch.bfloat16):
        assert mix(tensors).dtype == torch.float64


@pytest.mark.parametrize('name', ['plain', 'channel part', 'one group'])
@backends('reference', 'torch')
def test_gradcheck(backend, name, monkeypatch):
    b, n, g, p, c, q, *ranks = SIZES[name]
    small = 1, 2, min(g, 2), min(p, 3), min(c, 4), min(q, 3), *ranks
    monkeypatch.setitem(SIZES, 'small', small)
    tensors = make('small')
    used = [i for i, t in enumerate(tensors) if t is not None]

    def function(*given):
        full = [None] * 8
        for i, tensor in zip(used, given):
            full[i] = tensor
        return mix(full, backend)

    assert torch.autograd.gradcheck(function, [tensors[i] for i in used])


@pytest.mark.parametrize('queries', [1, 4])
def test_chunks_do_not_matter(queries, monkeypatch):
    """Four of six queries per chunk, so that the last has fewer; and one."""
    tensors = make('odd')
    wanted = run(lambda t: mix(t, 'torch'), tensors)
    elements = sum(t[0, 0, 0].numel() for t in tensors[:2])
    monkeypatch.setattr(torch_impl, 'MAX_THREADS', 1)
    monkeypatch.setattr(torch_impl, 'CHUNK_BYTES', queries * elements * 8)
    assert_close(run(lambda t: mix(t, 'torch'), tensors), wanted)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('number', [2, 5, 40])
@backends('cpu')
def test_any_number_of_threads(backend, number, threads):
    tensors = make('odd', torch.float32)
    wanted = run(lambda t: mix(t, backend), tensors)
    threads(number)
    found = run(lambda t: mix(t, backend), tensors)
    assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    again = run(lambda t: mix(t, backend), tensors)
    assert all(map(torch.equal, again, found))


@pytest.mark.parametrize('scale', [1.0, 1e-3, 0.0])
@backends('torch', 'cpu')
def test_statistics(backend, scale):
    """Of both norms, also where eps is most of a variance."""
    x, weights, *none = (
        t if t is None else t.detach() for t in make('plain', torch.float32)
    )
    x = scale * x
    _, stats = mixing_forward(x, weights, *none, 1e-5, backend)
    channel, spatial = split_weights(weights, *x.shape[-2:])
    y = x @ channel
    z = spatial @ F.relu(F.layer_norm(y, y.shape[-2:]))
    for product, found in zip((y, z), stats.split(2, -1)):
        flat = product.flatten(-2)
        variance = flat.var(-1, correction=0)
        assert_close(found[..., 0], flat.mean(-1), atol=1e-6, rtol=1e-5)
        assert_close(found[..., 1], (variance + 1e-5).rsqrt())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_wide_for_narrow_products(dtype):
    tensors = make('plain', dtype)
    out, stats = mixing_forward(*tensors, 1e-5, 'torch')
    assert out.dtype == dtype
    assert stats.dtype == torch.float32
    # More digits than the type of the products has.
    assert (stats != stats.to(dtype)).any()


@backends('reference', 'torch', 'cpu')
def test_large_offset(backend):
    """Features far from zero: variances must not cancel."""
    x, weights, *none = make('plain', torch.float32)
    x = 100 + 0.1 * x.detach()
    # The first product keeps the mean of 100 and the deviation of 0.1.
    weights = weights.detach().clone()
    weights[..., : 6 * 6] = torch.eye(6).flatten()
    wanted = mix([x.double(), weights.double(), *none], 'reference')
    assert error(mix([x, weights, *none], backend), wanted) < 1e-3


@backends('reference', 'torch', 'cpu')
def test_eps(backend):
    tensors = make('plain', torch.float32)
    found = mix(tensors, backend, eps=10.0)
    wide = [t if t is None else t.double() for t in tensors]
    channel, spatial = split_weights(wide[1], *wide[0].shape[-2:])
    y = wide[0] @ channel
    y = F.layer_norm(y, y.shape[-2:], eps=10.0).relu()
    z = spatial @ y
    z = F.layer_norm(z, z.shape[-2:], eps=10.0).relu()
    assert error(found, z) < 1e-6
    assert error(mix(tensors, backend), z) > 0.1


@backends('torch', 'cpu')
def test_nan_and_infinity_stay_in_their_query(backend):
    tensors = [
        t if t is None else t.detach() for t in make('odd', torch.float32)
    ]
    tensors[0][0, 1, 0, 2, 3] = float('nan')
    tensors[1][1, 2, 1, -1] = float('inf')
    found = run(lambda t: mix(t, backend), tensors)
    wanted = run(lambda t: mix(t, 'reference'), tensors)
    for a, b in zip(found[:3], wanted[:3]):
        assert torch.equal(a.isnan(), b.isnan())
    bad = found[0].isnan().flatten(3).any(3)
    assert bad.nonzero().tolist() == [[0, 1, 0], [1, 2, 1]]


@backends('reference', 'torch', 'cpu')
def test_input_used_twice(backend):
    """One tensor as two inputs collects both gradients."""
    x = torch.randn(1, 2, 1, 4, 4)
    upstream = torch.randn_like(x)

    def both(first, second):
        weights = torch.cat([second, second], -1).flatten(-2)
        return adaptive_mixing(first, weights, backend=backend)

    same, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (total,) = torch.autograd.grad(both(same, same), same, upstream)
    parts = torch.autograd.grad(both(same, other), (same, other), upstream)
    assert_close(total, sum(parts))


@backends('torch', 'cpu')
def test_is_deterministic_and_leaves_its_inputs_alone(backend):
    tensors = make('odd', torch.float32)
    before = copy.deepcopy(tensors)
    first = run(lambda t: mix(t, backend), tensors)
    again = run(lambda t: mix(t, backend), tensors)
    assert all(map(torch.equal, again, first))
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize('needed', [(0,), (1,), (2, 5), (3,), (0, 7)])
@backends('torch', 'cpu')
def test_only_some_inputs_need_gradients(backend, needed):
    tensors = make('odd', torch.float32)
    wanted = run(lambda t: mix(t, backend), tensors)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needed)
    given = [tensors[i] for i in needed]
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(
        wanted[0].shape, generator=rng, dtype=torch.float64
    ).float()
    found = torch.autograd.grad(mix(tensors, backend), given, upstream)
    assert_close(list(found), [wanted[i + 1] for i in needed])


@pytest.mark.parametrize('kind', ['expanded', 'zero', 'negative', 'turned'])
@backends('torch', 'cpu')
def test_gradients_without_memory_of_their_own(backend, kind):
    tensors = make('plain', torch.float32)[:2]
    out = adaptive_mixing(*tensors, backend=backend)
    plain = torch.randn(out.shape)
    if kind == 'expanded':
        upstream = torch.randn(()).expand(out.shape)
        plain = upstream.clone().contiguous()
    elif kind == 'zero':
        plain = plain * 0
        upstream = torch._efficientzerotensor(out.shape)
    elif kind == 'negative':
        upstream = torch._neg_view(-plain)
    else:
        upstream = plain.mT.contiguous().mT
    found = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    assert_close(found, torch.autograd.grad(out, tensors, plain))


@backends('torch', 'cpu')
def test_negative_views(backend):
    x, weights = make('plain', torch.float32)[:2]
    found = adaptive_mixing(torch._neg_view(x), weights, backend=backend)
    assert_close(found, adaptive_mixing(-x, weights, backend=backend))


def test_second_derivatives_are_refused():
    x, weights = make('plain')[:2]
    out = adaptive_mixing(x, weights, backend='torch')
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='adaptive_mixing_backward'):
        grad.sum().backward()


# What the compiler, tracers and exporters see.


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ('name', 'dtype', 'layout'),
    [
        ('plain', torch.float32, 'contiguous'),
        ('odd', torch.float32, 'transposed'),
        ('channel part', torch.float32, 'by group'),
        ('spatial part', torch.bfloat16, 'transposed'),
    ],
)
@backends('torch', 'cpu')
def test_opcheck(backend, name, dtype, layout):
    if backend == 'cpu':
        dtype = torch.float32
    change = LAYOUTS.get(layout, torch.clone)
    tensors = [
        t if t is None else change(t.detach()).requires_grad_()
        for t in make(name, dtype)
    ]
    torch.library.opcheck(mixing_forward, (*tensors, 1e-5, backend))
    plain = [t if t is None else t.detach() for t in tensors]
    out, stats = mixing_forward(*plain, 1e-5, backend)
    torch.library.opcheck(
        mixing_backward,
        (torch.randn_like(out), *plain, stats, 1e-5, backend),
    )


@pytest.mark.usefixtures('fresh_compiler')
@pytest.mark.parametrize(
    ('name', 'recompute'), [('plain', True), ('odd', False)]
)
@backends('torch', 'cpu')
def test_compiles_without_graph_break(backend, name, recompute):
    def function(tensors):
        return generate(tensors, backend, recompute)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    x, query, *rest = with_generator(name, torch.float32)
    for queries in (3, 1, 2):
        cut = [t if t is None or t.dim() < 6 else t[:, :queries] for t in rest]
        tensors = [x[:, :queries], query[:, :queries], *cut]
        assert_close(run(compiled, tensors), run(function, tensors))


@pytest.mark.usefixtures('fresh_compiler')
@backends('torch', 'cpu')
def test_compiles_with_dynamic_shapes(backend, monkeypatch):
    count = 0

    def count_graphs(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(
        mix, fullgraph=True, backend=count_graphs, dynamic=True
    )
    # Sizes that are equal by chance count as equal for the compiler.
    for queries in (7, 9):
        sizes = 2, queries, 3, 5, 4, 6, (2, 11), (2, 11)
        monkeypatch.setitem(SIZES, 'any', sizes)
        tensors = make('any', torch.float32)
        found = compiled(tensors, backend)
        assert_close(found, mix(tensors, backend))
    assert count == 1


@pytest.mark.thorough
@pytest.mark.usefixtures('fresh_compiler')
def test_compiles_to_machine_code():
    """Inductor relies on the strides that the operators announce."""
    tensors = with_generator('channel part', torch.float32)
    # One program does not pay for headers that many would share.
    options = dict(cpp_cache_precompile_headers=False)
    compiled = torch.compile(generate, fullgraph=True, options=options)
    assert_close(run(compiled, tensors), run(generate, tensors))


TENSORS = [t.detach() for t in with_generator('odd', torch.float32)]


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
def test_jit_trace(backend, grad):
    def function(*tensors):
        return generate(tensors, backend)

    tensors = [t.clone().requires_grad_(grad) for t in TENSORS]
    traced = torch.jit.trace(function, tensors, check_trace=False)
    other = [t.flip(0) for t in TENSORS]
    assert_close(traced(*other), function(*other))


@pytest.mark.parametrize('kind', ['fake', 'symbolic'])
@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_make_fx(backend, kind):
    def function(*tensors):
        return generate(tensors, backend)

    graph = make_fx(function, tracing_mode=kind)(*TENSORS)
    other = [t.flip(0) for t in TENSORS]
    assert_close(graph(*other), function(*other))


@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
def test_fake_tensors(backend):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t).requires_grad_() for t in TENSORS]
        out = generate(fakes, backend)
        grads = torch.autograd.grad(out.sum(), fakes)
    assert out.shape == generate(TENSORS).shape
    assert [g.shape for g in grads] == [t.shape for t in TENSORS]


@pytest.mark.parametrize('backend', ['auto', 'torch', 'reference'])
def test_exported_program(backend):
    class Mixing(torch.nn.Module):
        def forward(self, *tensors):
            return generate(tensors, backend)

    program = torch.export.export(Mixing(), tuple(TENSORS))
    other = [t.flip(0) for t in TENSORS]
    assert_close(program.module()(*other), generate(other, backend))


@backends('torch', 'cpu')
def test_functionalize_and_modes(backend):
    x, weights = make('plain', torch.float32)[:2]
    wanted = adaptive_mixing(x, weights, backend=backend)

    def function(x):
        return adaptive_mixing(x, weights, backend=backend) + 0

    with torch.no_grad():
        assert_close(torch.func.functionalize(function)(x), wanted)
    with FlopCounterMode(display=False):
        assert_close(function(x), wanted)


# What is refused.

BAD = {
    'x_dims': (0, (2, 3, 8, 6), 'x must have shape (B, N, G, P, C)'),
    'weights': (
        1,
        (2, 3, 2, 117),
        "weights must have shape (2, 3, 2, '36 + 8 Q') for x of shape "
        '(2, 3, 2, 8, 6), got (2, 3, 2, 117)',
    ),
    'weights_lead': (1, (2, 1, 2, 116), 'weights must have shape'),
    'weights_dims': (1, (2, 3, 232), 'weights must have shape'),
    'no_spatial': (1, (2, 3, 2, 36), 'weights must have shape'),
    'channel_left': (2, (2, 2, 5, 3), 'channel_low_rank.left must have'),
    'channel_core': (
        3,
        (2, 3, 2, 2, 3, 4),
        'channel_low_rank.core must have shape (2, 3, 2, 2, 3, 3)',
    ),
    'channel_right': (4, (2, 2, 3, 7), 'channel_low_rank.right must have'),
    'spatial_left': (5, (2, 2, 11, 3), 'spatial_low_rank.left must have'),
    'spatial_core': (6, (2, 3, 2, 1, 3, 3), 'spatial_low_rank.core must'),
    'spatial_right': (7, (2, 2, 3, 10), 'spatial_low_rank.right must have'),
    'groups': (2, (1, 2, 6, 3), 'channel_low_rank.left must have'),
}


@pytest.mark.parametrize('name', BAD)
def test_shapes_that_do_not_fit(name, monkeypatch):
    index, shape, message = BAD[name]
    monkeypatch.setitem(SIZES, 'bad', (2, 3, 2, 8, 6, 10, (2, 3), (2, 3)))
    tensors = make('bad')
    tensors[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        mix(tensors)


@pytest.mark.parametrize(
    ('index', 'shape', 'message'),
    [
        (0, (2, 3, 2, 48), 'weight must have shape'),
        (2, (233, 7), 'weight must have shape'),
        (2, (72, 7), 'weights must have shape'),
        (2, (234, 7), 'weights must have shape'),
    ],
)
def test_generators_that_do_not_fit(index, shape, message):
    tensors = with_generator('plain', bias=False)
    tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        generate(tensors)


@backends('cpu')
def test_what_the_library_would_misread_is_refused(backend):
    """The registered operator can be called without the public function."""
    good = [t.detach() for t in make('odd', torch.float32)]
    for index in range(len(NAMES)):
        for change in (lambda t: t.double(), lambda t: t[..., :-1]):
            tensors = list(good)
            tensors[index] = change(tensors[index])
            with pytest.raises((ValueError, RuntimeError)):
                mixing_forward(*tensors, 1e-5, backend)
    out, stats = mixing_forward(*good, 1e-5, backend)
    for bad in (out.double(), out[..., 1:], out[:1]):
        with pytest.raises(ValueError, match='grad_out must have shape'):
            mixing_backward(bad, *good, stats, 1e-5, backend)
    with pytest.raises(ValueError, match='stats must have shape'):
        mixing_backward(out, *good, stats[..., :2], 1e-5, backend)


def test_unknown_backend():
    tensors = make('plain')
    with pytest.raises(ValueError, match="backend='cuda' is no backend"):
        mix(tensors, 'cuda')


def test_backends_that_cannot_run(monkeypatch):
    tensors = make('plain', torch.float32)
    with pytest.raises(RuntimeError, match="='cpu' cannot.*torch.float64"):
        mix(make('plain'), 'cpu')
    monkeypatch.setitem(SIZES, 'large', (1, 1, 1, 300, 4, 5, None, None))
    large = make('large', torch.float32)
    with pytest.raises(RuntimeError, match='up to 256 rows.*P 300'):
        mix(large, 'cpu')
    assert_close(mix(large), mix(large, 'torch'), atol=0, rtol=0)
    monkeypatch.setenv(cpu_library.ENV_NAME, 'off')
    with pytest.raises(RuntimeError, match='switched off'):
        mix(tensors, 'cpu')
    assert_close(mix(tensors), mix(tensors, 'torch'), atol=0, rtol=0)


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        ({}, 'cpu'),
        (dict(dtype=torch.float64), 'torch'),
        (dict(dtype=torch.bfloat16), 'torch'),
        (dict(dtype=torch.float16), 'torch'),
        (dict(device='meta'), 'torch'),
        (dict(backend='torch'), 'torch'),
        (dict(backend='cpu'), 'cpu'),
        (dict(backend='reference'), None),
    ],
)
@backends('cpu')
def test_what_auto_takes(backend, change, wanted):
    options = dict(dtype=torch.float32, device='cpu', backend='auto')
    options.update(change)
    backend = options.pop('backend')
    tensors = [t if t is None else t.to(**options) for t in make('plain')]
    graph = make_fx(lambda *t: mix([*t, *[None] * 6], backend))(*tensors[:2])
    calls = [
        node.args[-1]
        for node in graph.graph.nodes
        if 'adaptive_mixing' in str(node.target)
    ]
    assert calls == ([wanted] if wanted else [])
