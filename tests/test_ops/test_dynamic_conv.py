"""Dynamic convolution: the fast path as the reference, and registered."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.testing import assert_close

from lors_plugin.ops import dynamic_conv2d, dynamic_linear
from lors_plugin.ops.dynamic_conv import fused, op

# in, out, kernel, height, width and what differs from a plain call
CASES = {
    'pointwise': (6, 10, (1, 1), 5, 7, {}),
    'pointwise_strided': (6, 10, (1, 1), 5, 7, dict(stride=2)),
    'pointwise_padded': (6, 10, (1, 1), 5, 7, dict(padding=(1, 0))),
    'pointwise_grouped': (6, 9, (1, 1), 5, 7, dict(groups=3)),
    'depthwise': (6, 6, (3, 3), 7, 5, dict(padding=1, groups=6)),
    'depthwise_strided': (
        6, 6, (5, 5), 9, 7, dict(padding=2, stride=2, groups=6)
    ),
    'depthwise_two_each': (4, 8, (3, 3), 6, 6, dict(groups=4)),
    'stem': (3, 8, (3, 3), 11, 9, dict(padding=1, stride=2)),
    'dilated': (4, 6, (3, 3), 9, 8, dict(dilation=(2, 1), padding=(2, 0))),
    'oblong': (4, 6, (1, 3), 5, 6, dict(stride=(2, 1), groups=2)),
    'one_place': (4, 6, (1, 1), 1, 1, {}),
    'one_channel': (1, 1, (3, 3), 4, 4, dict(padding=1)),
}  # fmt: skip
LAYOUTS = ('contiguous', 'channels_last', 'strided')


def make(
    case, batch=3, experts=4, dtype=torch.float32, bias=True, layout=None
):
    inner, outer, kernel, height, width, options = CASES[case]
    rng = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=rng, dtype=dtype)

    x = rand(batch, inner, height, width)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'strided':
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    width = inner // options.get('groups', 1)
    tensors = [
        x,
        rand(experts, outer, width, *kernel),
        rand(batch, experts).sigmoid(),
        rand(experts, outer) if bias else None,
    ]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    return tensors, options


def run(tensors, options, backend, function=dynamic_conv2d):
    """The result and the gradients of all inputs for a random one."""
    out = function(*tensors, **options, backend=backend)
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=rng).to(out)
    given = [t for t in tensors if t is not None and t.requires_grad]
    return out, *torch.autograd.grad(out, given, upstream)


def agree(tensors, options, function=dynamic_conv2d, **tolerance):
    results = [
        run(tensors, options, name, function)
        for name in ('torch', 'reference')
    ]
    assert_close(*results, **tolerance)


def small_pieces(monkeypatch, images=1):
    """Take so many images at once that several pieces are needed."""

    def pieces(x, weight):
        for start in range(0, len(x), images):
            yield slice(start, start + images)

    monkeypatch.setattr(fused, 'pieces', pieces)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('case', CASES)
def test_equals_the_reference(case, layout):
    tensors, options = make(case, layout=layout)
    agree(tensors, options, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        wanted = dynamic_conv2d(*tensors, **options, backend='reference')
        out = dynamic_conv2d(*tensors, **options)
    assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    last = layout == 'channels_last' and tensors[0].shape[1] > 1
    kind = torch.channels_last if last else torch.contiguous_format
    assert out.is_contiguous(memory_format=kind)


@pytest.mark.parametrize('batch', [0, 1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('case', ['pointwise', 'depthwise', 'stem'])
def test_few_images(case, bias, batch):
    for layout in LAYOUTS:
        tensors, options = make(case, batch, bias=bias, layout=layout)
        agree(tensors, options, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('images', [1, 2])
@pytest.mark.parametrize('case', ['pointwise', 'depthwise', 'stem'])
def test_pieces(case, images, monkeypatch):
    small_pieces(monkeypatch, images)
    for layout in LAYOUTS:
        tensors, options = make(case, batch=5, layout=layout)
        agree(tensors, options, rtol=1e-4, atol=1e-4)


def test_a_piece_is_what_fits():
    def pieces(batch, size):
        given = torch.empty(batch, 1), torch.empty(4, size)
        return [len(given[0][i]) for i in fused.pieces(*given)]

    numbers = fused.PIECE_BYTES // 4
    assert pieces(10, 7) == [10]
    assert pieces(10, numbers // 4) == [4, 4, 2]
    assert pieces(3, 2 * numbers) == [1, 1, 1]
    assert pieces(0, 0) == []


@pytest.mark.parametrize('case', CASES)
def test_against_autograd_in_float64(case):
    """The reference is a formula whose gradients are autograd's own."""
    tensors, options = make(case, 2, 3, torch.float64)
    agree(tensors, options, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('case', ['pointwise', 'depthwise', 'stem'])
def test_gradcheck(case):
    tensors, options = make(case, 2, 2, torch.float64)

    def function(*tensors):
        return dynamic_conv2d(*tensors, **options, backend='torch')

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_the_definition():
    """One image, one expert with the weight 1: a plain convolution."""
    (x, weight, _, bias), options = make('stem', 1, 1)
    one = torch.ones(1, 1)
    for backend in ('torch', 'reference'):
        out = dynamic_conv2d(x, weight, one, bias, **options, backend=backend)
        assert_close(out, F.conv2d(x, weight[0], bias[0], 2, 1))
    two = weight.repeat(2, 1, 1, 1, 1)
    half = torch.full((1, 2), 0.5)
    assert_close(
        dynamic_conv2d(x, two, half, bias.repeat(2, 1), **options), out
    )


@pytest.mark.parametrize('needed', range(4))
def test_only_what_is_asked_for(needed):
    for case in ('pointwise', 'depthwise'):
        tensors, options = make(case)
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == needed)
        agree(tensors, options, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', ['pointwise', 'depthwise', 'stem'])
def test_autocast(case, dtype):
    """As far off from float32 as the reference is, twice at most."""
    tensors, options = make(case)
    exact = run(tensors, options, 'reference')
    found = {}
    for backend in ('torch', 'reference'):
        with torch.autocast('cpu', dtype):
            found[backend] = run(tensors, options, backend)
        assert found[backend][0].dtype == dtype
        assert all(g.dtype == torch.float32 for g in found[backend][1:])
    for ours, theirs, wanted in zip(*found.values(), exact):
        error = (ours.float() - wanted).norm()
        assert error <= 2 * (theirs.float() - wanted).norm() + 1e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype):
    tensors, options = make('pointwise')
    half = [t.detach().to(dtype).requires_grad_() for t in tensors]
    half[2] = tensors[2].detach().requires_grad_()  # routing stays float32
    for case in ('torch', 'reference'):
        out = dynamic_conv2d(*half, **options, backend=case)
        assert out.dtype == dtype
        assert_close(
            out.float(),
            dynamic_conv2d(*tensors, **options),
            rtol=0.05,
            atol=0.05,
        )
    grads = run(half, options, 'torch')[1:]
    assert [g.dtype for g in grads] == [t.dtype for t in half]


def test_nothing_as_large_as_all_kernels_is_kept():
    tensors, options = make('pointwise')
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        dynamic_conv2d(*tensors, **options)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    assert {t.untyped_storage().data_ptr() for t in kept} <= given


def test_backward_twice():
    tensors, options = make('depthwise')
    out = dynamic_conv2d(*tensors, **options).square().sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert_close(torch.autograd.grad(out, tensors), first, rtol=0, atol=0)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layout', LAYOUTS[:2])
@pytest.mark.parametrize('case', ['pointwise', 'depthwise', 'stem'])
def test_registration(case, layout, bias):
    tensors, options = make(case, layout=layout, bias=bias)
    pairs = [options.get(k, d) for k, d in (('stride', 1), ('padding', 0))]
    geometry = [[p] * 2 for p in (*pairs, 1)], options.get('groups', 1)
    opcheck(op.conv2d, (*tensors, *geometry[0], geometry[1]))


def test_compiles_with_any_batch():
    tensors, options = make('depthwise')

    def function(x, weight, attention, bias):
        out = dynamic_conv2d(x, weight, attention, bias, **options)
        return dynamic_linear(out.mT, weight.flatten(2)[..., :7], attention)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    for batch in (3, 5):
        tensors, _ = make('depthwise', batch)
        results = []
        for f in (compiled, function):
            out = f(*tensors)
            results.append((out, *torch.autograd.grad(out.sum(), tensors)))
        assert_close(*results)


@pytest.mark.parametrize('shape', [(7, 6), (3, 4, 6), (6,)], ids=str)
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_linear(shape, batch):
    (_, weight, attention, bias), _ = make('pointwise', batch)
    weight = weight.detach().flatten(2).requires_grad_()
    x = torch.randn(batch, *shape).requires_grad_()
    agree((x, weight, attention, bias), {}, dynamic_linear)
    agree((x, weight, attention, None), {}, dynamic_linear)
    with torch.no_grad():
        out = dynamic_linear(x, weight, attention, bias)
    wanted = torch.einsum('b...i,boi->b...o', x, mixed(weight, attention))
    ones = [1] * (len(shape) - 1)
    offsets = mixed(bias, attention).view(batch, *ones, 10)
    assert_close(out, wanted + offsets)


def mixed(experts, attention):
    return torch.einsum('bm,m...->b...', attention, experts)


def test_linear_registration():
    (_, weight, attention, bias), _ = make('pointwise')
    x = torch.randn(3, 7, 6, requires_grad=True)
    opcheck(op.linear, (x, weight.flatten(2), attention, bias))
    opcheck(op.linear, (x, weight.flatten(2), attention, None))


def test_linear_in_pieces(monkeypatch):
    small_pieces(monkeypatch, 2)
    (_, weight, attention, bias), _ = make('pointwise', 5)
    x = torch.randn(5, 7, 6).requires_grad_()
    weight = weight.detach().flatten(2).requires_grad_()
    agree((x, weight, attention, bias), {}, dynamic_linear)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(x=torch.ones(2, 3, 4)), 'x must have shape'),
        (dict(groups=2), 'does not fit 2 groups'),
        (dict(groups=0), 'does not fit 0 groups'),
        (dict(attention=torch.ones(2, 4)), r'shape \(B, M\) = \(2, 3\)'),
        (dict(bias=torch.ones(3)), r'\(M, C_out\) = \(3, 5\)'),
        (dict(stride=0), 'stride=0'),
        (dict(padding=(1, 2, 3)), 'padding='),
        (dict(backend='triton'), "backend='triton'"),
    ],
)
def test_what_does_not_fit(change, words):
    given = dict(
        x=torch.ones(2, 4, 6, 6),
        weight=torch.ones(3, 5, 4, 3, 3),
        attention=torch.ones(2, 3),
    )
    with pytest.raises(ValueError, match=words):
        dynamic_conv2d(**{**given, **change})


def test_linear_that_does_not_fit():
    with pytest.raises(ValueError, match='x must have shape'):
        dynamic_linear(torch.ones(2, 3), torch.ones(4, 5, 6), torch.ones(2, 4))


def test_the_backend_of_the_environment(monkeypatch):
    """Whoever asks for Triton everywhere gets what there is."""
    tensors, options = make('pointwise')
    monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'triton')
    dynamic_conv2d(*tensors, **options)
    monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'reference')
    monkeypatch.setattr(op, 'conv2d', None)
    dynamic_conv2d(*tensors, **options)
    monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'fast')
    with pytest.raises(ValueError, match="'fast'"):
        dynamic_conv2d(*tensors, **options)
