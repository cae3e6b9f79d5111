"""Mixing in compiled code: the numbers of the reference, for every CPU."""

import ctypes
import shutil
import weakref

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    adaptive_mixing,
    compiled_library,
    generated_mixing,
)
from lors_plugin.ops.adaptive_mixing import compiled, fused
from lors_plugin.ops.adaptive_mixing.op import mixing_forward
from lors_plugin.ops.compiled_library import ENV_NAME, CompiledLibrary, load

# B, N, G, P, C, Q, then K and r of both low-rank parts, or nothing.
SIZES = {
    'lors': (2, 3, 2, 64, 128, 128, 3, 16),
    'adamixer': (1, 4, 4, 32, 64, 128),
    'odd': (2, 3, 2, 17, 33, 19, 2, 5),
    'halves': (1, 5, 1, 36, 24, 44, 1, 8),
    'tiny': (1, 2, 2, 1, 1, 1, 1, 1),
    'one_query': (1, 1, 3, 5, 20, 7),
}
SETS = ('avx-512', 'avx2', 'baseline')


@pytest.fixture(autouse=True)
def needs_compiled_code():
    found = compiled_library.find_sets()
    if isinstance(found, str):
        pytest.skip(found)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ask_for(name, monkeypatch):
    known = {one.name.lower(): one for one in compiled_library.find_sets()}
    if name not in known or not known[name].runs:
        pytest.skip(f'this CPU has no {name}')
    monkeypatch.setenv(ENV_NAME, name)


def make(sizes, seed=0):
    """x, weights and six or no factors in float64."""
    b, n, g, p, c, q, *ranks = SIZES[sizes]
    shapes = [(b, n, g, p, c), (b, n, g, c * c + q * p)]
    for rows, cols in ((c, c), (q, p)) if ranks else ():
        k, r = ranks
        shapes += [(g, k, rows, r), (b, n, g, k, r, r), (g, k, r, cols)]
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, dtype=torch.float64, generator=generator)
        for s in shapes
    ]


def run(tensors, dtype=torch.float32, backend='torch', seed=1):
    """Output and all gradients."""
    x, weights, *factors = given = [
        t.to(dtype).detach().requires_grad_() for t in tensors
    ]
    parts = [LowRank(*factors[:3]), LowRank(*factors[3:])] if factors else []
    out = adaptive_mixing(x, weights, *parts, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(
        out.shape, dtype=torch.float64, generator=generator
    ).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


def errors(found, wanted):
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(found, wanted)
    ]


def refuse(*_):
    raise AssertionError('plain PyTorch was used')


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('name', SETS)
def test_equals_the_reference(name, sizes, monkeypatch):
    ask_for(name, monkeypatch)
    tensors = make(sizes)
    wanted = run(tensors, torch.float64, 'reference')
    monkeypatch.setattr(fused, 'Workspace', refuse)
    found = run(tensors)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    # A single number is its own mean.
    if sizes != 'tiny':
        assert max(errors(found, wanted)) < 3e-6
    else:
        assert all(t.abs().max() == 0 for t in found)


@pytest.mark.parametrize('sizes', ['lors', 'odd'])
@pytest.mark.parametrize('number', [1, 2, 5, 40])
def test_any_number_of_threads(number, sizes, threads):
    tensors = make(sizes)
    wanted = run(tensors)
    threads(number)
    found = run(tensors)
    for a, b in zip(found, wanted):
        assert_close(a, b, atol=2e-5, rtol=2e-5)
    # To the last bit.
    assert all(torch.equal(a, b) for a, b in zip(run(tensors), found))


def test_inputs_with_gaps():
    tensors = [t.float() for t in make('odd')]
    wanted = run(tensors)
    x, weights, c_left, c_core, *rest = tensors
    gaps = [
        x.permute(2, 3, 0, 4, 1).contiguous().permute(2, 4, 0, 1, 3),
        torch.stack([weights] * 2, -1)[..., 0],
        c_left.mT.contiguous().mT,
        c_core.mT.contiguous().mT,
        *(torch.stack([t, t], 1)[:, 0] for t in rest),
    ]
    assert [t.is_contiguous() for t in gaps] == [False] * 8
    for a, b in zip(run(gaps), wanted):
        assert torch.equal(a, b)


def test_matrices_of_the_caller_stay_as_they_are():
    x, weights, *factors = (t.float() for t in make('odd'))
    before = weights.clone()
    parts = LowRank(*factors[:3]), LowRank(*factors[3:])
    adaptive_mixing(x, weights, *parts)
    assert torch.equal(weights, before)


@pytest.mark.parametrize('sizes', ['lors', 'odd'])
def test_large_means(sizes, monkeypatch):
    """Of products a thousand times larger than what varies in them."""
    x, weights, *factors = make(sizes)
    x, weights = x + 300, weights + 3
    tensors = [x.float().double(), weights.float().double()]
    wanted = run(tensors, torch.float64, 'reference')
    found = errors(run(tensors), wanted)
    monkeypatch.setenv(ENV_NAME, 'off')
    plain = errors(run(tensors), wanted)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(found, plain))


def test_what_is_not_a_number_stays_so(monkeypatch):
    tensors = make('odd')
    tensors[0][0, 1, 0, 2, 3] = float('nan')
    tensors[1][1, 2, 1, -1] = float('inf')
    found = run(tensors)
    monkeypatch.setenv(ENV_NAME, 'off')
    plain = run(tensors)
    for a, b in zip(found[:3], plain[:3]):
        assert torch.equal(a.isnan(), b.isnan())
    bad = found[0].isnan().flatten(3).any(3)
    assert bad.nonzero().tolist() == [[0, 1, 0], [1, 2, 1]]


@pytest.mark.parametrize('shape', [(0, 3), (2, 0)])
def test_no_query(shape):
    x = torch.randn(*shape, 2, 5, 4, requires_grad=True)
    weights = torch.randn(*shape, 2, 4 * 4 + 3 * 5, requires_grad=True)
    out = adaptive_mixing(x, weights)
    assert out.shape == (*shape, 2, 3, 4)
    grads = torch.autograd.grad(out.sum(), (x, weights))
    assert [g.shape for g in grads] == [x.shape, weights.shape]


X, QUERY = torch.randn(2, 3, 2, 6, 8), torch.randn(2, 3, 9)
GENERATOR = torch.randn(2 * (8 * 8 + 7 * 6), 9)


def shared_call(x, query=QUERY, generator=GENERATOR):
    """What stages do: autograd function or none, no operator around it."""
    sums = GradientSum()
    return generated_mixing(x, query, generator, gradient_sum=sums)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(channel=torch.randn(2, 4, 8)[..., ::2]), 'channel has gaps'),
        (dict(channel=torch.randn(4, 4).expand(2, 4, 4)), 'or overlaps'),
        (dict(channel=torch.randn(2, 5, 5)), 'channel must have shape'),
        (dict(spatial=torch.randn(1, 5, 3)), r'shape \(2, 5, 3\) in float32'),
        (dict(spatial=torch.randn(2, 5, 3).double()), 'got .* torch.float64'),
        (dict(core=torch.randn(1, 1, 1, 1, 2, 2)), 'core must have shape'),
        (dict(right=torch.randn(1, 1, 2, 3)), 'right must have shape'),
    ],
)
def test_what_does_not_fit_is_refused_rather_than_misread(change, words):
    given = dict(
        channel=torch.randn(2, 4, 4),
        spatial=torch.randn(2, 5, 3),
        left=torch.randn(1, 1, 4, 2),
        core=torch.randn(1, 2, 1, 1, 2, 2),
        right=torch.randn(1, 1, 2, 4),
    )
    channel, spatial, *factors = {**given, **change}.values()
    x, factors = torch.randn(1, 2, 1, 3, 4), (*factors, None, None, None)
    matrices = fused.of_group([channel], [spatial])
    with pytest.raises(ValueError, match=words):
        compiled.mix(load(), x, 5, matrices, factors, 1e-5, in_place=True)


def test_types_do_not_mix():
    x, weights = X, torch.randn(2, 3, 2, 8 * 8 + 7 * 6)
    for other in (weights.double(), weights.half()):
        with pytest.raises((RuntimeError, ValueError)):
            mixing_forward(x, other, *(None,) * 6, 1e-5, 'torch')


def test_who_gets_it(monkeypatch):
    x = torch.randn(1, 2, 1, 3, 4)
    assert isinstance(compiled.find_library(x, 5), CompiledLibrary)
    assert compiled.find_library(x, 5, x, None) is not None
    assert compiled.find_library(x, 5, x.double()) is None
    assert compiled.find_library(x, 2000) is None
    assert compiled.find_library(x[:0], 5) is None
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert compiled.find_library(x.to(dtype), 5) is None
    assert compiled.find_library(x.to('meta'), 5) is None
    with FlopCounterMode(display=False):
        assert compiled.find_library(x, 5) is None
    monkeypatch.setenv(ENV_NAME, 'off')
    assert compiled.find_library(x, 5) is None


def test_matrices_of_one_group_at_a_time():
    alive = []

    def matrices(group):
        assert [ref() for ref in alive] == [None] * len(alive)
        pair = torch.randn(6, 8, 8), torch.randn(6, 7, 6)
        alive.extend(map(weakref.ref, pair))
        return pair

    compiled.mix(load(), X, 7, matrices, (None,) * 6, 1e-5, in_place=True)
    assert len(alive) == 4


@torch.no_grad()
def test_tracing():
    traced = torch.jit.trace(shared_call, (X,), check_trace=False)
    other = torch.randn_like(X)
    assert_close(traced(other), shared_call(other))


@torch.no_grad()
def test_functionalize():
    found = torch.func.functionalize(lambda x: shared_call(x) + 0)(X)
    assert_close(found, shared_call(X))


@torch.no_grad()
def test_negative_views():
    assert_close(shared_call(torch._neg_view(X)), shared_call(-X))


@pytest.mark.parametrize('kind', ['zero', 'negative'])
def test_gradients_without_numbers_of_their_own(kind):
    x, generator = X.clone().requires_grad_(), GENERATOR.clone()
    out = shared_call(x, generator=generator.requires_grad_())
    plain = torch.randn(out.shape)
    if kind == 'zero':
        plain, upstream = plain * 0, torch._efficientzerotensor(out.shape)
    else:
        upstream = torch._neg_view(-plain)
    (found,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    (wanted,) = torch.autograd.grad(out, x, plain)
    assert_close(found, wanted)


def test_the_widest_set_that_runs(monkeypatch):
    monkeypatch.delenv(ENV_NAME, raising=False)
    running = [s.name for s in compiled_library.find_sets() if s.runs]
    assert load().name == running[0]
    assert running[-1] == 'baseline'
    monkeypatch.setenv(ENV_NAME, ' BASELINE')
    assert load().name == 'baseline'


def test_unknown_set(monkeypatch):
    monkeypatch.setenv(ENV_NAME, 'avx1024')
    with pytest.raises(RuntimeError, match="'avx1024' is none of .*baseline"):
        load()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package folder that holds no compiled code yet."""
    caches = compiled_library.find_sets, compiled_library._choose
    for cache in caches:
        cache.cache_clear()
    library = compiled_library.PACKAGE / compiled_library.FILE
    monkeypatch.setattr(compiled_library, 'PACKAGE', tmp_path)
    yield tmp_path, library
    for cache in caches:
        cache.cache_clear()


def test_without_compiled_code(elsewhere, monkeypatch, caplog):
    monkeypatch.delenv(ENV_NAME, raising=False)
    assert load() is None and load() is None
    (record,) = caplog.records
    assert 'no C++ compiler' in record.message
    monkeypatch.setenv(ENV_NAME, 'baseline')
    with pytest.raises(RuntimeError, match="'baseline': there is no _cpu.so"):
        load()


def test_file_that_is_no_library(elsewhere):
    (elsewhere[0] / '_cpu.so').write_text('text')
    assert 'cannot be loaded' in compiled_library.find_sets()


@pytest.fixture
def checkout(elsewhere):
    """With sources and with what was built from others."""
    folder, library = elsewhere
    shutil.copytree(library.parent / 'csrc', folder / 'csrc')
    source = folder / 'csrc' / 'mixing.cpp'
    source.write_text('#error "broken here"')
    shutil.copy(library, folder / '_cpu.so')
    return folder, source, (library.parent / 'csrc' / 'mixing.cpp').read_text()


@pytest.mark.parametrize('state', ['outdated', 'missing', 'no library'])
def test_a_checkout_compiles_what_it_needs(checkout, state):
    folder, source, right = checkout
    source.write_text(right + '// changed\n')
    if state == 'missing':
        (folder / '_cpu.so').unlink()
    elif state == 'no library':
        (folder / '_cpu.so').write_text('text')
    found = compiled_library.find_sets()
    assert [one.name for one in found][-1] == 'baseline'
    assert {p.name for p in folder.iterdir()} == {'csrc', '_cpu.so'}
    digest = compiled_library.hash_sources(folder / 'csrc')
    assert found[0]._library.lors_sources().decode() == digest


def test_a_checkout_that_does_not_compile(checkout, monkeypatch):
    folder, *_ = checkout
    found = compiled_library.find_sets()
    assert '_cpu.so cannot be compiled' in found and 'broken here' in found
    assert {p.name for p in folder.iterdir()} == {'csrc', '_cpu.so'}
    monkeypatch.setenv('PATH', str(folder))
    monkeypatch.delenv('CXX', raising=False)
    compiled_library.find_sets.cache_clear()
    assert 'and no C++ compiler here' in compiled_library.find_sets()


def test_a_wheel_without_sources(elsewhere):
    folder, library = elsewhere
    shutil.copy(library, folder / '_cpu.so')
    assert isinstance(compiled_library.find_sets(), list)


def test_structures_are_those_of_the_library():
    """Eight bytes a field, so that nothing depends on padding."""
    for structure in (compiled._LowRank, compiled._Mixing):
        size = sum(ctypes.sizeof(kind) for _, kind in structure._fields_)
        assert ctypes.sizeof(structure) == size
