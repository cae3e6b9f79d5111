"""Dynamic convolution: each implementation against formula and reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close

from lors_plugin.ops import dynamic_conv2d, dynamic_linear
from lors_plugin.ops.dynamic_conv import grouped, op

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
    'one_position': (4, 6, (1, 1), 1, 1, {}),
    'one_channel': (1, 1, (3, 3), 4, 4, dict(padding=1)),
}  # fmt: skip
KINDS = ('pointwise', 'depthwise', 'stem')
LAYOUTS = ('contiguous', 'channels_last', 'strided')
IMPLEMENTATIONS = ('reference', 'torch', 'chunks')
TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=1e-4, atol=1e-4),
}
HALF = (torch.bfloat16, torch.float16)


def make(case, batch=3, dtype=torch.float32, bias=True, layout='contiguous'):
    """Tensors (x, weight, attention, bias) with gradients, and options."""
    inner, outer, kernel, height, width, options = CASES[case]
    rng = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=rng, dtype=dtype)

    x = rand(batch, inner, height, width)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'strided':
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    tensors = [
        x,
        rand(4, outer, inner // options.get('groups', 1), *kernel),
        rand(batch, 4).sigmoid(),
        rand(4, outer) if bias else None,
    ]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    return tensors, options


def formula(x, weight, attention, bias=None, **options):
    """Image by image, expert by expert: sums of plain convolutions."""
    outs = []
    for image, shares in zip(x, attention):
        parts = [
            share * F.conv2d(
                image[None], kernel, None if bias is None else bias[m],
                **options,
            )
            for m, (share, kernel) in enumerate(zip(shares, weight))
        ]  # fmt: skip
        outs.append(sum(parts))
    return torch.cat(outs)


def run(function, tensors, options):
    """The result, and the gradients of all inputs for a random one."""
    out = function(*tensors, **options)
    rng = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=rng).to(out)
    given = [t for t in tensors if t is not None and t.requires_grad]
    return out, *torch.autograd.grad(out, given, upstream)


@pytest.fixture
def implement(monkeypatch):
    """Choose the implementation of later calls."""

    def choose(name, function=dynamic_conv2d):
        if name == 'chunks':  # one image in each
            monkeypatch.setattr(grouped, 'CHUNK_BYTES', 1)
        backend = 'reference' if name == 'reference' else 'torch'
        return lambda *given, **kw: function(*given, **kw, backend=backend)

    return choose


@pytest.mark.parametrize(
    ('layout', 'dtype'),
    [
        ('contiguous', torch.float64),
        ('channels_last', torch.float32),
        ('strided', torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_forward_and_gradients(implementation, case, layout, dtype, implement):
    tensors, options = make(case, dtype=dtype, layout=layout)
    function = implement(implementation)
    wanted = run(formula, tensors, options)
    assert_close(run(function, tensors, options), wanted, **TOLERANCE[dtype])
    with torch.no_grad():
        out = function(*tensors, **options)
    assert_close(out, wanted[0], **TOLERANCE[dtype])
    if implementation != 'reference':
        last = layout == 'channels_last' and tensors[0].shape[1] > 1
        kind = torch.channels_last if last else torch.contiguous_format
        assert out.is_contiguous(memory_format=kind)


@pytest.mark.parametrize('batch', [0, 1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('case', KINDS)
def test_few_images(case, bias, batch):
    for layout in LAYOUTS:
        tensors, options = make(case, batch, bias=bias, layout=layout)
        results = [
            run(dynamic_conv2d, tensors, dict(options, backend=backend))
            for backend in ('torch', 'reference')
        ]
        assert_close(*results, rtol=1e-4, atol=1e-4)


def test_chunks_are_what_fits():
    def sizes(batch, size):
        x, weight = torch.empty(batch, 1), torch.empty(4, size)
        return [len(x[i]) for i in grouped.chunks(x, weight)]

    elements = grouped.CHUNK_BYTES // 4
    assert sizes(10, 7) == [10]
    assert sizes(10, elements // 4) == [4, 4, 2]
    assert sizes(3, 2 * elements) == [1, 1, 1]
    assert sizes(0, 0) == []


@pytest.mark.parametrize('case', KINDS)
def test_gradcheck(case):
    tensors, options = make(case, 2, torch.float64)

    def function(*tensors):
        return dynamic_conv2d(*tensors, **options, backend='torch')

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize('needed', range(4))
@pytest.mark.parametrize('case', KINDS)
def test_only_what_is_asked_for(case, needed):
    tensors, options = make(case)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == needed)
    found = run(dynamic_conv2d, tensors, options)
    wanted = run(formula, tensors, options)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('case', KINDS)
def test_autocast(case, dtype):
    """As far off from float32 as the reference is, twice at most."""
    tensors, options = make(case)
    exact = run(formula, tensors, options)
    found = []
    for backend in ('torch', 'reference'):
        with torch.autocast('cpu', dtype):
            given = dict(options, backend=backend)
            found.append(run(dynamic_conv2d, tensors, given))
        assert found[-1][0].dtype == dtype
        assert all(g.dtype == torch.float32 for g in found[-1][1:])
    for ours, theirs, wanted in zip(*found, exact):
        error = (ours.float() - wanted).norm()
        assert error <= 2 * (theirs.float() - wanted).norm() + 1e-3


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('backend', ['torch', 'reference'])
def test_half_precision_weights(backend, dtype):
    tensors, options = make('pointwise')
    half = [t.detach().to(dtype).requires_grad_() for t in tensors]
    half[2] = tensors[2].detach().requires_grad_()  # routing stays float32
    out, *grads = run(dynamic_conv2d, half, dict(options, backend=backend))
    assert out.dtype == dtype
    assert [g.dtype for g in grads] == [t.dtype for t in half]
    wanted = run(formula, tensors, options)
    for value, exact in zip((out, *grads), wanted):
        assert_close(value.float(), exact, rtol=0.05, atol=0.2)


def test_only_the_inputs_are_kept_for_backward():
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


@pytest.mark.parametrize(
    ('layout', 'bias'), [('contiguous', True), ('channels_last', False)]
)
@pytest.mark.parametrize('case', KINDS)
def test_registration(case, layout, bias):
    tensors, options = make(case, layout=layout, bias=bias)
    pairs = [options.get(k, d) for k, d in (('stride', 1), ('padding', 0))]
    geometry = [[p] * 2 for p in (*pairs, 1)]
    opcheck(op.conv2d, (*tensors, *geometry, options.get('groups', 1)))


def both(x, weight, attention, bias):
    """A depth-wise convolution, then a linear layer on its columns."""
    options = CASES['depthwise'][-1]
    out = dynamic_conv2d(x, weight, attention, bias, **options)
    return dynamic_linear(out.mT, weight.flatten(2)[..., :7], attention)


def test_compiles_with_any_batch():
    compiled = torch.compile(both, fullgraph=True, backend='aot_eager')
    for batch in (3, 5):
        tensors, _ = make('depthwise', batch)
        results = []
        for f in (compiled, both):
            out = f(*tensors)
            results.append((out, *torch.autograd.grad(out.sum(), tensors)))
        assert_close(*results)


class Both(torch.nn.Module):
    def forward(self, *tensors):
        return both(*tensors)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize(
    'how', ['trace', 'export', 'real', 'fake', 'symbolic']
)
def test_traced(how, grad):
    tensors, _ = make('depthwise')
    others = [t.detach() + 0.1 for t in tensors]
    with torch.set_grad_enabled(grad):
        if not grad:
            tensors = [t.detach() for t in tensors]
        if how == 'trace':
            traced = torch.jit.trace(Both(), tuple(tensors))
            assert 'lors_plugin::' not in str(traced.inlined_graph)
        elif how == 'export':
            traced = torch.export.export(Both(), tuple(tensors)).module()
        else:
            traced = make_fx(both, tracing_mode=how)(*tensors)
        assert_close(traced(*others), both(*others))


def test_fake_tensors():
    tensors, options = make('stem')
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        out = dynamic_conv2d(*fakes, **options)
        out.sum().backward()
    assert out.shape == dynamic_conv2d(*tensors, **options).shape
    assert [f.grad.shape for f in fakes] == [t.shape for t in tensors]


@pytest.mark.parametrize('shape', [(7, 6), (3, 4, 6), (1, 6), (6,)], ids=str)
@pytest.mark.parametrize('batch', [0, 1, 3])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_linear(implementation, batch, shape, implement):
    def linear_formula(x, weight, attention, bias=None):
        out = torch.einsum('b...i,bm,moi->b...o', x, attention, weight)
        if bias is not None:
            ones = [1] * (len(shape) - 1)
            out = out + (attention @ bias).view(batch, *ones, 10)
        return out

    function = implement(implementation, dynamic_linear)
    (_, weight, attention, bias), _ = make('pointwise', batch)
    weight = weight.detach().flatten(2).requires_grad_()
    x = torch.randn(batch, *shape, requires_grad=True)
    for given in ((x, weight, attention, bias), (x, weight, attention, None)):
        wanted = run(linear_formula, given, {})
        assert_close(run(function, given, {}), wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            out = function(*given)
        assert_close(out, wanted[0], rtol=1e-4, atol=1e-4)
        assert out.is_contiguous()


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
    """Triton, asked for everywhere, is what there is; nonsense is refused."""
    tensors, options = make('pointwise')
    wanted = formula(*tensors, **options)
    for name in ('triton', 'reference'):
        monkeypatch.setenv('LORS_PLUGIN_BACKEND', name)
        assert_close(dynamic_conv2d(*copy.copy(tensors), **options), wanted)
    monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'fast')
    with pytest.raises(ValueError, match="'fast'"):
        dynamic_conv2d(*tensors, **options)
