"""3D sampling: every implementation against the reference and a formula."""

import copy
import functools
import io
import math
import re
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lors_plugin.ops import SharedLevels, sampling_3d, share_levels
from lors_plugin.ops.sampling_3d import MAX_WIDTH, op
from lors_plugin.ops.sampling_3d.level_gradients import (
    TableGradient,
    sort_by_row,
)
from lors_plugin.ops.sampling_3d.reference import level_weights

IMPLEMENTATIONS = ['reference', 'torch', 'shared']
SHAPES = {
    'square_strides': dict(),
    'odd': dict(groups=3, points=5, width=7, strides=(3, 5, 11)),
    'one_level': dict(strides=(8,)),
    'one_group_one_channel': dict(groups=1, width=1, points=1),
    'one_query': dict(queries=1, batch=1),
    'single_pixels': dict(strides=(100, 200)),
    'no_query': dict(queries=0),
    'no_image': dict(batch=0),
    'channels_last': dict(layout='channels_last'),
    'transposed': dict(layout='transposed'),
}
DTYPES = {  # of levels, of points, of the result
    'float32': (torch.float32, torch.float32, torch.float32),
    'float64': (torch.float64, torch.float64, torch.float64),
    'float64_points': (torch.float32, torch.float64, torch.float64),
    'float64_levels': (torch.float64, torch.float32, torch.float64),
    'float16_levels': (torch.float16, torch.float32, torch.float32),
    'bfloat16_levels': (torch.bfloat16, torch.float32, torch.float32),
}
LAYOUTS = {
    'contiguous': lambda t: t.contiguous(),
    'channels_last': lambda t: t.contiguous(memory_format=torch.channels_last),
    'transposed': lambda t: t.mT.contiguous().mT,
}


def make(
    batch=2,
    queries=3,
    groups=2,
    points=4,
    width=3,
    strides=(4, 8, 16),
    layout='contiguous',
    dtypes=(torch.float32, torch.float32),
    seed=0,
):
    """Levels of a 96 x 64 image and points in and around it."""
    rng = torch.Generator().manual_seed(seed)
    feats = [
        torch.randn(
            batch, groups * width, 64 // s + 1, 96 // s + 1, generator=rng
        )
        for s in strides
    ]
    where = torch.rand(batch, queries, groups, points, 3, generator=rng)
    where = where * torch.tensor([140.0, 100, 5]) - torch.tensor([20.0, 15, 0])
    if layout == 'transposed':
        where = where.transpose(1, 3).contiguous().transpose(1, 3)
    feats = [LAYOUTS[layout](feat.to(dtypes[0])) for feat in feats]
    leaves = [t.requires_grad_() for t in (where.to(dtypes[1]), *feats)]
    return leaves[1:], leaves[0], strides


def sample(name, feats, points, strides):
    if name == 'shared':
        return sampling_3d(share_levels(feats, 'torch'), points, strides)
    return sampling_3d(feats, points, strides, name)


def several(feats, points, strides, name='shared'):
    """Samplings of the same levels with other queries, points and groups."""
    where = [points, points[:, :2] + 1, points.flatten(2, 3)[:, :, None]]
    if name == 'shared':
        feats, name = share_levels(feats, 'torch'), 'torch'
    return [sampling_3d(feats, each, strides, name) for each in where]


def upstream(outs):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=rng).to(o.dtype) for o in outs]


def gradients(outs, inputs, retain=False):
    return torch.autograd.grad(
        outs, inputs, upstream(outs), retain_graph=retain
    )


def bilinear(feat, x, y):
    """Value of a (C, H, W) map at a position in cells; zero outside."""
    total = feat.new_zeros(feat.shape[0])
    left, top = (
        math.floor(float(x.detach()) - 0.5),
        math.floor(float(y.detach()) - 0.5),
    )
    for col in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= col < feat.shape[2] and 0 <= row < feat.shape[1]:
                share = (1 - abs(x - 0.5 - col)) * (1 - abs(y - 0.5 - row))
                total = total + share * feat[:, row, col]
    return total


def formula(feats, points, strides):
    """Section 3.1 of AdaMixer, one point and one level at a time."""
    batch, queries, groups, number, _ = points.shape
    width = feats[0].shape[1] // groups
    feats = [feat.double() for feat in feats]
    values = []
    for b, n, g, p in torch.cartesian_prod(
        *(torch.arange(size) for size in (batch, queries, groups, number))
    ).tolist():
        x, y, z = points[b, n, g, p].double()
        weights = [torch.exp(-((z - math.log2(s)) ** 2) / 2) for s in strides]
        total = 0.0
        for feat, stride, weight in zip(feats, strides, weights):
            own = feat[b, g * width : (g + 1) * width]
            value = bilinear(own, x / stride, y / stride)
            total = total + weight / sum(weights) * value
        values.append(total)
    out = torch.stack(values) if values else points.new_zeros(0)
    return out.double().view(batch, queries, groups, number, width)


@functools.cache
def truth(shape, dtype):
    """Result of the formula and gradients of points and levels."""
    *dtypes, wanted = DTYPES[dtype]
    feats, points, strides = make(**SHAPES[shape], dtypes=dtypes)
    inputs = [points, *feats]
    out = formula(feats, points, strides)
    grads = [torch.zeros_like(t) for t in inputs]
    if out.numel():
        grad = upstream([out.to(wanted)])[0].double()
        grads = torch.autograd.grad(out, inputs, grad)
    return out.detach(), grads


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [(shape, dtype) for shape in SHAPES for dtype in ('float32', 'float64')]
    + [
        (shape, dtype)
        for shape in ('odd', 'transposed', 'no_query')
        for dtype in list(DTYPES)[2:]
    ],
)
def test_forward_and_gradients(shape, dtype, name):
    *dtypes, wanted = DTYPES[dtype]
    feats, points, strides = make(**SHAPES[shape], dtypes=dtypes)
    inputs = [points, *feats]
    out = sample(name, feats, points, strides)
    assert out.dtype == wanted
    expected, expected_grads = truth(shape, dtype)
    limit = 1e-9 if wanted == torch.float64 else 5e-5
    assert_close(out.double(), expected, rtol=limit, atol=limit)
    grads = gradients([out], inputs)
    for have, want, leaf in zip(grads, expected_grads, inputs):
        # Rounded to the dtype of the leaf, whatever the sums are in.
        limit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(
            leaf.dtype, 2 * torch.finfo(leaf.dtype).eps
        )
        assert_close(have, want, rtol=limit, atol=limit)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_gradcheck(name):
    feats, points, strides = make(
        batch=1, queries=2, points=2, width=1, strides=(16, 32)
    )
    inputs = [t.detach().double().requires_grad_() for t in (points, *feats)]
    assert torch.autograd.gradcheck(
        lambda where, *levels: sample(name, levels, where, strides), inputs
    )
    assert torch.autograd.gradcheck(
        lambda where, *levels: tuple(several(levels, where, strides, name)),
        inputs,
    )


# --- what the numbers mean -------------------------------------------------


def test_level_weights_sum_to_one_and_prefer_their_scale():
    z = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    weights = level_weights(z, (4, 8, 16, 32))
    assert weights.shape == (4, 2, 2)
    assert_close(weights.sum(0), torch.ones(2, 2))
    assert weights.argmax(0).flatten().tolist() == [0, 1, 2, 3]
    ratio = weights[0, 0, 0] / weights[1, 0, 0]
    assert_close(ratio.item(), math.exp(0.5), rtol=1e-5, atol=0)


def test_extreme_scales_stay_finite():
    z = torch.tensor([-50.0, 80.0])
    weights = level_weights(z, (4, 8, 16, 32))
    assert_close(weights.sum(0), torch.ones(2))
    assert weights.argmax(0).tolist() == [0, 3]


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_cell_centres_give_the_cells(name):
    """Pixel (stride (i + 1/2)) is the centre of cell i: half-pixel rule."""
    feat = torch.arange(12.0).view(1, 1, 3, 4)
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing='ij')
    xy = (torch.stack([x, y], -1) + 0.5) * 8
    points = torch.cat([xy, torch.zeros(3, 4, 1)], -1).view(1, 1, 1, 12, 3)
    out = sample(name, [feat], points, (8,))
    assert_close(out.flatten(), feat.flatten())


@pytest.mark.parametrize('name', ['torch', 'shared'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_points_anywhere(dtype, name):
    """On edges, on corners, far away and beyond what an index can hold."""
    feats, _, strides = make(batch=1, groups=1, strides=(4, 8))
    height, width = feats[0].shape[2:]
    places = [-1e30, -1e10, -9.0, -2.0, 0.0, 2.0, 6.0, 1e10, 3e38]
    x = torch.tensor([*places, 4.0 * width, 4.0 * width + 2])
    y = torch.tensor([*places, 4.0 * height, 4.0 * height - 2])
    z = torch.tensor([-100.0, 2.5, 100.0])
    points = torch.cartesian_prod(x, y, z).view(1, 1, 1, -1, 3).to(dtype)
    results = []
    for each in (name, 'reference'):
        out = sample(each, feats, points, strides)
        assert out.isfinite().all()
        results.append((out, *gradients([out], feats)))
    assert_close(*results)


def test_nan_stays_in_its_point():
    feats, points, strides = make()
    wanted = sampling_3d(feats, points, strides, 'torch')
    broken = points.detach().clone()
    broken[0, 0, 0, 0] = torch.nan
    out = sampling_3d(feats, broken, strides, 'torch')
    assert out[0, 0, 0, 0].isnan().all()
    assert torch.equal(out[1], wanted[1])
    assert torch.equal(out[0, 1:], wanted[0, 1:])


def test_levels_of_several_dtypes():
    feats, points, strides = make()
    feats[1] = feats[1].detach().bfloat16().requires_grad_()
    feats[2] = feats[2].detach().half()
    results = []
    for name in IMPLEMENTATIONS:
        out = sample(name, feats, points, strides)
        grads = gradients([out], feats[:2])
        assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
        results.append((out, *grads))
    assert results[0][0].dtype == torch.float32
    for result in results[1:]:
        assert_close(result, results[0])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_autocast_changes_nothing(name, dtype):
    feats, points, strides = make()
    wanted = sample(name, feats, points, strides)
    with torch.autocast('cpu', dtype):
        out = sample(name, feats, points, strides)
    assert torch.equal(out, wanted)
    inputs = [points, *feats]
    for a, b in zip(gradients([out], inputs), gradients([wanted], inputs)):
        assert torch.equal(a, b)


# --- levels that are shared ------------------------------------------------


def test_any_number_of_samplings_and_backward_passes():
    """All at once, again, in part, one after the other: the same sums."""
    feats, points, strides = make(queries=20)
    inputs = [points, *feats]
    wanted = several(feats, points, strides, 'reference')
    outs = several(feats, points, strides)
    close = dict(rtol=1e-4, atol=1e-4)
    assert_close(outs, wanted, **close)
    first = gradients(outs, inputs, retain=True)
    assert_close(first, gradients(wanted, inputs, retain=True), **close)
    again = gradients(outs, inputs, retain=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    total = [torch.zeros_like(t) for t in inputs]
    for i, (out, want) in enumerate(zip(outs, wanted)):
        # `upstream` of one is that of all for the first only.
        grad = upstream(outs)[i]
        found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        expected = torch.autograd.grad(want, inputs, grad, retain_graph=True)
        assert_close(found, expected, **close)
        total = [a + b for a, b in zip(total, found)]
    assert_close(total, list(first), **close)


def test_one_gradient_for_all_samplings():
    """Levels get the sum in one pass; anything else gets its elements."""
    feats, points, strides = make()
    shared = share_levels(feats, 'torch')
    outs = [sampling_3d(shared, points + i, strides) for i in range(3)]
    (grad,) = gradients(outs, [shared.table], retain=True)
    assert isinstance(grad, TableGradient)
    assert len(grad.terms) == 3
    parts = [
        torch.autograd.grad(out, shared.table, g, retain_graph=True)[0].clone()
        for out, g in zip(outs, upstream(outs))
    ]
    assert type(parts[0]) is torch.Tensor
    assert_close(grad * 1, sum(parts))
    assert_close(grad + parts[0], sum(parts) + parts[0])
    doubled = grad + grad  # with elements by now
    assert_close(doubled, 2 * sum(parts))


@pytest.mark.parametrize('reentrant', [False, True])
def test_samplings_that_run_again_in_backward(reentrant):
    feats, points, strides = make()
    inputs = [points, *feats]
    wanted = several(feats, points, strides, 'reference')
    shared = share_levels(feats, 'torch')

    def run(table, where):
        levels = shared._replace(table=table)
        return sampling_3d(levels, where, strides)

    outs = [
        checkpoint(run, shared.table, where, use_reentrant=reentrant)
        for where in (points, points[:, :2] + 1)
    ]
    for out in (outs, wanted[:2]):
        for leaf in inputs:
            leaf.grad = None
        torch.autograd.backward(out, upstream(out))
        if out is outs:
            found = [leaf.grad for leaf in inputs]
    assert_close(found, [leaf.grad for leaf in inputs], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('needs', [(0,), (1, 3), (2,), ()])
def test_gradients_of_what_needs_them(needs, name):
    """0 means the points, the others are levels."""
    feats, points, strides = make()
    inputs = [points, *feats]
    wanted = gradients([sample('reference', feats, points, strides)], inputs)
    inputs = [t.detach() for t in inputs]
    for i in needs:
        inputs[i].requires_grad_()
    out = sample(name, inputs[1:], inputs[0], strides)
    assert out.requires_grad == bool(needs)
    if needs:
        out.backward(upstream([out])[0])
    for i, (leaf, want) in enumerate(zip(inputs, wanted)):
        assert (leaf.grad is not None) == (i in needs)
        if i in needs:
            assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4)


def test_gradient_through_other_operations():
    """As on GPUs, where PyTorch's own operations make the table."""
    feats, points, strides = make()
    rows = [2 * f.permute(0, 2, 3, 1).flatten(0, 2) for f in feats]
    shared = share_levels(feats, 'torch')._replace(table=torch.cat(rows))
    outs = [sampling_3d(shared, points + i, strides) for i in range(2)]
    double = [2 * feat for feat in feats]
    wanted = [
        sampling_3d(double, points + i, strides, 'reference') for i in range(2)
    ]
    inputs = [points, *feats]
    found, expected = gradients(outs, inputs), gradients(wanted, inputs)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_shared_levels_are_the_levels():
    feats, points, strides = make()
    assert share_levels(feats, 'reference') is feats
    shared = share_levels(feats, 'torch')
    assert isinstance(shared, SharedLevels)
    assert_close(shared.maps(), feats)
    results = []
    for levels in (shared, feats):
        out = sampling_3d(levels, points, strides, 'reference')
        results.append((out, *gradients([out], [points, *feats])))
    assert_close(*results, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        copied = copy.deepcopy(share_levels(feats, 'torch'))
    assert not copied.table.requires_grad
    assert torch.equal(
        sampling_3d(copied, points, strides),
        sampling_3d(shared, points, strides),
    )


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients_are_laid_out_as_their_levels(layout):
    feats, points, strides = make(layout=layout)
    if layout == 'transposed':  # which is given back channels last
        feats = [LAYOUTS['channels_last'](feat) for feat in feats]
    for feat in feats:
        (grad,) = gradients([sample('shared', feats, points, strides)], [feat])
        assert grad.stride() == feat.stride()


def test_two_runs_agree_to_the_bit():
    feats, points, strides = make(queries=50)
    first, second = (
        gradients(several(feats, points, strides), [points, *feats])
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_second_derivative():
    feats, points, strides = make()
    for leaf in (points, feats[0]):
        out = sampling_3d(feats, points, strides, 'torch')
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match='lors_plugin.sampling_3d_back'):
            grad.square().sum().backward()


@pytest.mark.parametrize(
    ('reads', 'rows'), [(500, 7), (20, 60), (1, 1), (0, 3)]
)
def test_counting_and_searching_sort_alike(reads, rows):
    rng = torch.Generator().manual_seed(0)
    where = torch.randint(rows, (reads,), generator=rng)
    counted, searched = (sort_by_row(where, rows, s) for s in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(counted, searched))
    begins = [int((where < row).sum()) for row in range(rows)]
    assert counted[1].tolist() == begins
    ordered = where[counted[0]]
    assert torch.equal(ordered, ordered.sort()[0])


def test_gradient_in_several_blocks():
    """A table of 4 MB; a block is 1 MB."""
    feats, points, strides = make(
        batch=1, queries=40, groups=1, width=1024, points=2, strides=(2, 8)
    )
    results = []
    for name in ('shared', 'reference'):
        out = sample(name, feats, points, strides)
        results.append(gradients([out], feats))
    assert_close(*results, rtol=1e-4, atol=1e-4)


# --- compilers and tracers -------------------------------------------------


class Several(torch.nn.Module):
    def __init__(self, strides):
        super().__init__()
        self.strides = strides

    def forward(self, points, *feats):
        outs = several(feats, points, self.strides)
        return [out.flatten(1) for out in outs]


def arguments(seed, height=64, **changes):
    feats, points, strides = make(seed=seed, **changes)
    feats = [feat[:, :, : height // s + 1] for feat, s in zip(feats, strides)]
    return Several(strides), (points, *feats)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled(dynamic):
    """One graph, forward and backward."""
    torch._dynamo.reset()
    strides = (4, 16)
    model, _ = arguments(0, strides=strides)
    compiled = torch.compile(
        model, fullgraph=True, backend='aot_eager', dynamic=dynamic
    )
    for queries in (3, 5):
        _, inputs = arguments(queries, queries=queries, strides=strides)
        results = []
        for function in (compiled, model):
            outs = function(*inputs)
            results.append((*outs, *gradients(outs, inputs)))
        assert_close(*results, rtol=1e-5, atol=1e-5)


def test_jit_trace():
    model, inputs = arguments(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        traced = torch.jit.trace(model, inputs)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    _, others = arguments(1)
    assert_close(torch.jit.load(file)(*others), model(*others))


@pytest.mark.parametrize('mode', ['real', 'fake', 'symbolic'])
def test_make_fx(mode):
    """Forward and backward; symbolic sizes fit other levels."""

    def run(points, *feats):
        outs = model(points, *feats)
        return torch.autograd.grad(
            sum(out.sum() for out in outs), [points, *feats]
        )

    model, inputs = arguments(0)
    graph = make_fx(run, tracing_mode=mode)(*inputs)
    _, others = arguments(1, height=48 if mode == 'symbolic' else 64)
    others = [t.detach().requires_grad_() for t in others]
    assert_close(graph(*others), run(*others), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('strict', [False, True])
def test_export(strict):
    auto = torch.export.Dim.AUTO
    model, inputs = arguments(0)
    sizes = dict(
        points={1: auto}, feats=tuple({2: auto, 3: auto} for _ in inputs[1:])
    )
    program = torch.export.export(
        model, inputs, dynamic_shapes=sizes, strict=strict
    )
    _, others = arguments(1, height=48, queries=7)
    assert_close(program.module()(*others), model(*others))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        model, inputs = arguments(0)
        outs = model(*inputs)
        grads = gradients(outs, inputs)
    assert [out.shape for out in outs] == [(2, 72), (2, 48), (2, 144)]
    assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize('queries', [3, 0])
def test_opcheck(queries):
    feats, points, strides = make(batch=1, queries=queries, strides=(8, 16))
    shared = share_levels(feats, 'torch')
    sizes = [size for shape in shared.spatial_shapes for size in shape]
    table = shared.table.detach()
    grad = torch.randn(*points.shape[:4], 3)
    for needs in ([True, True], [False, True], [True, False]):
        opcheck(
            op.sampling_backward,
            (grad, table, points.detach(), sizes, list(strides), needs)
            + ('torch',),
        )
        leaves = [
            t.detach().requires_grad_(need)
            for t, need in zip((table, points), needs)
        ]
        opcheck(op.sampling_forward, (*leaves, sizes, list(strides), 'torch'))


# --- errors ----------------------------------------------------------------

BAD = {
    'levels': (3, (2, 3, 2, 4, 3), (4, 8), '3 feature levels do not fit 2'),
    'no_level': (0, (2, 3, 2, 4, 3), (), 'at least one feature level'),
    'points_dims': (
        3,
        (2, 3, 8, 3),
        (4, 8, 16),
        'points must have shape (B, N, G, P, 3), got (2, 3, 8, 3)',
    ),
    'points_last': (
        3,
        (2, 3, 2, 4, 2),
        (4, 8, 16),
        'points must have shape (B, N, G, P, 3)',
    ),
    'batch': (
        3,
        (1, 3, 2, 4, 3),
        (4, 8, 16),
        'points of 1 images do not fit levels of 2 images',
    ),
    'groups': (
        3,
        (2, 3, 4, 4, 3),
        (4, 8, 16),
        'levels of 6 channels do not fit points of 4 groups',
    ),
    'no_group': (
        3,
        (2, 3, 0, 4, 3),
        (4, 8, 16),
        'levels of 6 channels do not fit points of 0 groups',
    ),
}


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', BAD)
def test_shapes_that_do_not_fit(case, name):
    levels, shape, strides, message = BAD[case]
    feats = make()[0][:levels]
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(name, feats, torch.zeros(shape), strides)


@pytest.mark.parametrize(
    ('level', 'message'),
    [
        (lambda feat: feat[:, :4], 'feats[2] has 2 images of 4 channels'),
        (lambda feat: feat[:1], 'feats[2] has 1 images of 6 channels'),
        (lambda feat: feat[0], 'feats[2] must have shape (B, D, H, W)'),
        (lambda feat: feat[..., :0], '(2, 6, 5, 0) has no cells'),
    ],
)
def test_levels_that_do_not_fit(level, message):
    feats, points, strides = make()
    feats[2] = level(feats[2])
    for call in (
        lambda: sampling_3d(feats, points, strides),
        lambda: share_levels(feats),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_widths_beyond_the_kernels(monkeypatch):
    """'auto' goes on without them, 'triton' says why it cannot."""
    from lors_plugin.ops import backend

    monkeypatch.setattr(backend, 'device_verdict', lambda *args: (True, ''))
    monkeypatch.delenv(backend.ENV_NAME, raising=False)
    feats = [torch.randn(1, MAX_WIDTH + 1, 2, 2)]
    points = torch.rand(1, 1, 1, 2, 3) * 8
    out = sampling_3d(feats, points, (4,))
    assert_close(out, sampling_3d(feats, points, (4,), 'reference'))
    with pytest.raises(RuntimeError, match=f'got {MAX_WIDTH + 1}'):
        sampling_3d(feats, points, (4,), 'triton')


def test_the_kernels_take_the_widths_that_are_said():
    pytest.importorskip('triton')
    from lors_plugin.ops.sampling_3d import triton_kernels

    assert triton_kernels.MAX_TILE == MAX_WIDTH
