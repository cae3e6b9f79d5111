"""The plain PyTorch path of 3D sampling: as the reference, and registered."""

import copy
import re

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from lors_plugin.ops import sampling_3d, share_levels
from lors_plugin.ops.sampling_3d import (
    MAX_WIDTH,
    PackedLevels,
    fused,
    level_gradients,
    op,
)

SIZES = {
    'square_strides': dict(),
    'odd': dict(groups=3, points=5, width=7, strides=(3, 5, 11)),
    'one_level': dict(strides=(8,)),
    'one_query': dict(queries=1, batch=1),
    'no_query': dict(queries=0),
    'no_image': dict(batch=0),
    'half_levels': dict(levels=torch.float16),
    'wide_levels': dict(levels=torch.float64),
}


def make(
    batch=2,
    queries=3,
    groups=2,
    points=4,
    width=3,
    strides=(4, 8, 16),
    levels=torch.float32,
    seed=0,
):
    rng = torch.Generator().manual_seed(seed)
    feats = [
        torch.randn(
            batch, groups * width, 64 // s + 1, 96 // s + 1, generator=rng
        )
        .to(levels)
        .requires_grad_()
        for s in strides
    ]
    where = torch.rand(batch, queries, groups, points, 3, generator=rng)
    where = where * torch.tensor([140.0, 100, 5]) - torch.tensor([20.0, 15, 0])
    return feats, where.requires_grad_(), strides


def gradients(outs, inputs, retain=False):
    rng = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(out.shape, generator=rng).to(out.dtype) for out in outs
    ]
    return torch.autograd.grad(outs, inputs, upstream, retain_graph=retain)


@pytest.mark.parametrize('name', SIZES)
def test_equals_the_reference(name):
    feats, points, strides = make(**SIZES[name])
    results = []
    for backend in ('torch', 'reference'):
        out = sampling_3d(feats, points, strides, backend)
        results.append((out, *gradients([out], [points, *feats])))
    assert_close(*results, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_points_anywhere(dtype):
    """On edges, on corners, far away and beyond what an index can hold."""
    feats, _, strides = make(batch=1, groups=1, strides=(4, 8))
    height, width = feats[0].shape[2:]
    places = [-1e30, -1e10, -9.0, -2.0, 0.0, 2.0, 6.0, 1e10, 3e38]
    x = torch.tensor([*places, 4.0 * width, 4.0 * width + 2])
    y = torch.tensor([*places, 4.0 * height, 4.0 * height - 2])
    z = torch.tensor([-100.0, 2.5, 100.0])
    points = torch.cartesian_prod(x, y, z).view(1, 1, 1, -1, 3).to(dtype)
    points.requires_grad_()
    results = []
    for backend in ('torch', 'reference'):
        out = sampling_3d(feats, points, strides, backend)
        assert out.isfinite().all()
        results.append((out, *gradients([out], feats)))
    assert_close(*results)


def test_a_point_that_is_no_number_breaks_nothing_else():
    feats, points, strides = make()
    wanted = sampling_3d(feats, points, strides, 'torch')
    broken = points.detach().clone()
    broken[0, 0, 0, 0] = torch.nan
    out = sampling_3d(feats, broken, strides, 'torch')
    assert out[0, 0, 0, 0].isnan().all()
    assert torch.equal(out[1], wanted[1])
    assert torch.equal(out[0, 1:], wanted[0, 1:])


def test_memory_layouts_agree():
    feats, points, strides = make()
    wanted = sampling_3d(feats, points, strides, 'torch')
    grads = gradients([wanted], feats)
    last = [f.to(memory_format=torch.channels_last) for f in feats]
    out = sampling_3d(last, points, strides, 'torch')
    assert torch.equal(out, wanted)
    for grad, other in zip(grads, gradients([out], last)):
        assert torch.equal(grad, other)
        assert grad.is_contiguous()
        assert other.is_contiguous(memory_format=torch.channels_last)
    where = points.transpose(1, 3).contiguous().transpose(1, 3)
    assert not where.is_contiguous()
    assert torch.equal(sampling_3d(feats, where, strides, 'torch'), wanted)


def test_levels_of_several_types_are_read_as_float32():
    feats, points, strides = make()
    feats[1] = feats[1].detach().bfloat16()
    feats[2] = feats[2].detach().half()
    results = [
        sampling_3d(feats, points, strides, b) for b in ('torch', 'reference')
    ]
    assert results[0].dtype == torch.float32
    assert_close(*results)


def test_twice_is_the_same_to_the_last_bit():
    feats, points, strides = make(queries=50)
    first, second = (
        gradients([sampling_3d(feats, points, strides, 'torch')], feats)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize('shared', [False, True])
def test_no_gradient_of_levels_that_need_none(shared, monkeypatch):
    """A frozen backbone costs no gradient as large as its levels."""
    feats, points, strides = make()
    feats = [feat.detach() for feat in feats]

    def no_gradient(*args):
        raise AssertionError('computed')

    monkeypatch.setattr(level_gradients, 'levels_gradient', no_gradient)
    if shared:
        feats = share_levels(feats, strides, [points.shape[1:4]], 'torch')[0]
    sampling_3d(feats, points, strides, 'torch').sum().backward()
    assert points.grad.abs().sum() > 0


def test_no_gradient_of_points_that_need_none(monkeypatch):
    feats, points, strides = make()

    def no_gradient(*args):
        raise AssertionError('computed')

    monkeypatch.setattr(fused, 'points_gradient', no_gradient)
    sampling_3d(feats, points.detach(), strides, 'torch').sum().backward()
    assert feats[0].grad.abs().sum() > 0


def three_calls(feats, points, strides, backend, shared=True):
    """Calls that differ in queries, groups and points."""
    where = [points, points[:, :2] + 1, points.flatten(2, 3)[:, :, None]]
    levels = [feats] * 3
    if shared:
        calls = [w.shape[1:4] for w in where]
        levels = share_levels(feats, strides, calls, backend)
    return [
        sampling_3d(level, w, strides, backend)
        for level, w in zip(levels, where)
    ]


def test_shared_levels():
    feats, points, strides = make()
    inputs = [points, *feats]
    outs = three_calls(feats, points, strides, 'torch')
    wanted = three_calls(feats, points, strides, 'reference', False)
    assert_close(outs, wanted, rtol=1e-5, atol=2e-5)
    grads = gradients(outs, inputs, retain=True)
    assert_close(grads, gradients(wanted, inputs, True), rtol=1e-5, atol=2e-5)
    again = gradients(outs, inputs, retain=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, again))
    for out, want in zip(outs, wanted):
        assert_close(
            gradients([out], feats, retain=True),
            gradients([want], feats, retain=True),
            rtol=1e-5,
            atol=2e-5,
        )


def test_shared_levels_are_one_gradient(monkeypatch):
    feats, points, strides = make()
    calls = []
    function = level_gradients.levels_gradient
    monkeypatch.setattr(
        level_gradients,
        'levels_gradient',
        lambda grads, *args: (
            calls.append(len(grads)) or function(grads, *args)
        ),
    )
    gradients(three_calls(feats, points, strides, 'torch'), feats)
    assert calls == [3]


def test_shared_levels_gradcheck():
    feats, points, strides = make(
        batch=1, queries=2, points=2, width=1, strides=(16, 32)
    )
    inputs = [t.detach().double().requires_grad_() for t in (points, *feats)]
    assert torch.autograd.gradcheck(
        lambda where, *levels: tuple(
            three_calls(levels, where, strides, 'torch')
        ),
        inputs,
    )


def test_other_backends_get_the_levels_as_they_are():
    feats, points, strides = make()
    calls = [points.shape[1:4]] * 2
    levels = share_levels(feats, strides, calls, 'reference')
    assert all(level is feats for level in levels)
    packed = share_levels(feats, strides, calls, 'torch')[0]
    results = []
    for level in (packed, feats):
        out = sampling_3d(level, points, strides, 'reference')
        results.append((out, *gradients([out], [points, *feats])))
    assert_close(*results)
    with torch.no_grad():
        first, second = share_levels(feats, strides, calls, 'torch')
    assert isinstance(first, PackedLevels)
    assert not first.tokens
    assert first.table is second.table
    copied = copy.deepcopy(first)
    assert torch.equal(
        sampling_3d(copied, points, strides),
        sampling_3d(feats, points, strides, 'torch'),
    )


def test_shared_levels_used_wrongly():
    feats, points, strides = make()
    level = share_levels(feats, strides, [points.shape[1:4]], 'torch')[0]
    message = 'shared for points of shape (2, 3, 2, 4, 3), got (2, 2, 2, 4, 3)'
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_3d(level, points[:, :2], strides)
    with pytest.raises(ValueError, match='3 feature levels do not fit 2'):
        sampling_3d(level, points, strides[:2])
    message = 'shared for strides (4, 8, 16), got (8, 16, 32)'
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_3d(level, points, (8, 16, 32))
    message = 'got torch.float64; use share_levels(..., dtype=torch.float64)'
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_3d(level, points.double(), strides)
    with pytest.raises(ValueError, match='points of 1 images do not fit'):
        sampling_3d(level, points[:1], strides)
    twice = sampling_3d(level, points, strides) + sampling_3d(
        level, points * 1.1, strides
    )
    with pytest.raises(RuntimeError, match='sampled twice'):
        twice.sum().backward()


def test_a_call_that_no_loss_depends_on():
    """Compiled programs may give zeros for it, and count no use."""
    feats, points, strides = make()
    sizes = [size for feat in feats for size in feat.shape[2:]]
    grads = [torch.randn(*points.shape[:4], 3), torch.zeros(2, 3, 2, 4, 3)]
    where = [points.detach(), torch.zeros_like(points)]
    counts = [torch.ones(1), torch.zeros(1)]
    layout = sizes, list(strides), [True] * len(feats)
    total = op.levels_gradient(grads, where, counts, *layout)
    alone = op.levels_gradient(grads[:1], where[:1], counts[:1], *layout)
    assert_close(total, alone)
    counts = [torch.ones(1), torch.full((1,), 2.0)]
    with pytest.raises(RuntimeError, match='sampled twice'):
        op.levels_gradient(grads, where, counts, *layout)


@pytest.mark.parametrize(
    ('reads', 'rows'), [(500, 7), (20, 60), (1, 1), (0, 3)]
)
def test_rows_are_found_alike_by_counting_and_searching(reads, rows):
    rng = torch.Generator().manual_seed(0)
    where = torch.randint(rows, (reads,), generator=rng)
    counted, searched = (
        level_gradients.by_row(where, rows, s) for s in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(counted, searched))
    begins = [int((where < row).sum()) for row in range(rows)]
    assert counted[1].tolist() == begins
    ordered = where[counted[0]]
    assert torch.equal(ordered, ordered.sort()[0])


def test_widths_beyond_the_kernels(monkeypatch):
    """'auto' goes on without them, 'triton' says why it cannot."""
    from lors_plugin.ops import backend

    choose, asked = backend._choose, []

    def on_a_gpu(requested, kind, index, dtype, refusal):
        asked.append(refusal)
        return choose(requested, 'cuda', index, dtype, refusal)

    monkeypatch.setattr(backend, 'device_verdict', lambda *args: (True, ''))
    monkeypatch.setattr(backend, '_choose', on_a_gpu)
    monkeypatch.delenv(backend.ENV_NAME, raising=False)
    feats = [torch.randn(1, MAX_WIDTH + 1, 2, 2)]
    points = torch.rand(1, 1, 1, 2, 3) * 8
    out = sampling_3d(feats, points, (4,))
    assert_close(out, sampling_3d(feats, points, (4,), 'reference'))
    assert f'up to {MAX_WIDTH} channels' in asked[0]
    with pytest.raises(RuntimeError, match=f'got {MAX_WIDTH + 1}'):
        sampling_3d(feats, points, (4,), 'triton')
    asked.clear()
    sampling_3d([feats[0][:, 1:]], points, (4,), 'torch')
    assert asked == ['']


def test_the_kernels_take_the_widths_that_are_said():
    pytest.importorskip('triton')
    from lors_plugin.ops.sampling_3d import triton_kernels

    assert triton_kernels.MAX_TILE == MAX_WIDTH


def test_compiled():
    """One graph, forward and backward, for any number of queries."""
    torch._dynamo.reset()
    compiled = torch.compile(
        three_calls, fullgraph=True, backend='aot_eager', dynamic=True
    )
    for queries in (3, 5):
        feats, points, strides = make(queries=queries)
        results = []
        for function in (compiled, three_calls):
            outs = function(feats, points, strides, 'torch')
            results.append((*outs, *gradients(outs, [points, *feats])))
        assert_close(*results)


def test_registered():
    feats, points, strides = make(batch=1, queries=2, strides=(8, 16))
    strides = list(strides)
    sizes = [size for feat in feats for size in feat.shape[2:]]
    shape = list(points.shape[:4])
    out = torch.randn(*shape, 3)
    calls = [torch.float32, shape, strides]
    table = op.pack([feat.detach() for feat in feats], torch.float32)
    tokens = [t.clone() for t in op.make_tokens(feats, *calls)]
    where = points.detach()
    opcheck(op.pack, ([feat.detach() for feat in feats], torch.float32))
    opcheck(op.points_gradient, (out, table, where, sizes, strides, 'torch'))
    counts, planar = [torch.ones(1)], [True, False]
    opcheck(
        op.levels_gradient, ([out], [where], counts, sizes, strides, planar)
    )
    opcheck(op.make_tokens, (feats, *calls))
    opcheck(op.sample, (table, points, [], sizes, strides, 'torch'))
    for token in tokens:
        token.requires_grad_()
    opcheck(op.sample, (table, points, tokens, sizes, strides, 'torch'))


@pytest.mark.parametrize('planar', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_levels_block_by_block(planar, dtype, monkeypatch):
    """Of three cells, the last of fewer, as at once."""
    feats, points, strides = make(queries=5)
    feats = [feat.detach().to(dtype) for feat in feats]
    if not planar:
        feats = [
            feat.contiguous(memory_format=torch.channels_last)
            for feat in feats
        ]
    for feat in feats:
        feat.requires_grad_()
    grads = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    for size in (level_gradients.BLOCK_BYTES, 3 * feats[0].shape[1] * 4):
        monkeypatch.setattr(level_gradients, 'BLOCK_BYTES', size)
        outs = three_calls(feats, points, strides, 'torch')
        grads.append(gradients(outs, feats))
    for whole, parts, feat in zip(*grads, feats):
        assert torch.equal(whole, parts)
        assert parts.dtype == dtype
        assert parts.stride() == feat.stride()
