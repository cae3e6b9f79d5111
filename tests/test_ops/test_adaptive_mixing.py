"""Adaptive mixing against the formula of the papers, in every mode."""

import re

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.ops import LowRank, adaptive_mixing
from lors_plugin.ops.adaptive_mixing.reference import split_weights

pytestmark = pytest.mark.usefixtures('cpu_program')

# Name: B, N, G, P, C, Q, K, r; K = 0 means no low-rank part.
SIZES = {
    'plain': (2, 3, 2, 8, 6, 10, 0, 0),
    'odd': (2, 3, 2, 36, 24, 7, 2, 5),
    'one_query': (1, 1, 2, 9, 8, 5, 1, 4),
    'one_group': (2, 3, 1, 4, 6, 9, 3, 2),
    'one_point': (1, 2, 2, 1, 4, 1, 1, 1),
    'no_query': (2, 0, 2, 8, 6, 10, 2, 3),
    'no_image': (0, 3, 2, 8, 6, 10, 1, 3),
}
NAMES = (
    'x',
    'weights',
    'channel.left',
    'channel.core',
    'channel.right',
    'spatial.left',
    'spatial.core',
    'spatial.right',
)


def make_inputs(sizes, dtype=torch.float32, scale=1.0):
    """Leaves in the order of ``NAMES``; two where K is 0."""
    b, n, g, p, c, q, k, r = sizes
    shapes = [(b, n, g, p, c), (b, n, g, c * c + q * p)]
    for rows, cols in ((c, c), (q, p)) if k else ():
        shapes += [(g, k, rows, r), (b, n, g, k, r, r), (g, k, r, cols)]
    return [
        (torch.randn(shape, dtype=dtype) * scale).requires_grad_()
        for shape in shapes
    ]


def call(inputs, backend):
    x, weights, *factors = inputs
    parts = [LowRank(*factors[i : i + 3]) for i in range(0, len(factors), 3)]
    return adaptive_mixing(x, weights, *parts, backend=backend)


def run(inputs, upstream, backend):
    """The output and the gradients of all inputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = call(inputs, backend)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def norm(x):
    """LayerNorm of one matrix, in words of the paper."""
    centred = x - x.mean()
    return (centred / (centred.square().mean() + 1e-5).sqrt()).clamp(min=0)


def matrices(row, p, c):
    """The channel matrix and the spatial one of a query and group."""
    return row[: c * c].view(c, c), row[c * c :].view(-1, p)


def formula(inputs):
    """Sections 3.2 (AdaMixer) and 3.3 (LORS), a query and group a time."""
    x, weights, *factors = inputs
    b, n, g, p, c = x.shape
    out = []
    for i in range(b):
        for j in range(n):
            for h in range(g):
                m, s = matrices(weights[i, j, h], p, c)
                if factors:
                    ml, me, mr, sl, se, sr = factors
                    for k in range(ml.shape[1]):
                        m = m + torch.einsum(
                            'ar,rt,tb->ab', ml[h, k], me[i, j, h, k], mr[h, k]
                        )
                        s = s + torch.einsum(
                            'ar,rt,tb->ab', sl[h, k], se[i, j, h, k], sr[h, k]
                        )
                y = norm(torch.einsum('pc,cd->pd', x[i, j, h], m))
                out.append(norm(torch.einsum('qp,pd->qd', s, y)))
    return torch.stack(out).unflatten(0, (b, n, g))


@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize(
    'name', [n for n, s in SIZES.items() if s[0] * s[1] > 0]
)
def test_equals_the_formula(name, backend):
    inputs = make_inputs(SIZES[name], torch.float64)
    wanted = formula(inputs)
    upstream = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, inputs, upstream)
    have = run(inputs, upstream, backend)
    assert have[0].dtype == torch.float64
    assert_close(have, [wanted.detach(), *grads])


@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize('num', [0, 1, 2], ids='K={}'.format)
def test_gradcheck(num, backend):
    inputs = make_inputs((1, 2, 2, 3, 4, 3, num, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(tensors, backend), inputs
    )


@pytest.mark.parametrize('name', SIZES)
def test_torch_equals_reference_in_float32(name):
    inputs = make_inputs(SIZES[name])
    b, n, g, _, c, q, _, _ = SIZES[name]
    upstream = torch.randn(b, n, g, q, c)
    wanted = run(inputs, upstream, 'reference')
    have = run(inputs, upstream, 'torch')
    assert have[0].shape == (b, n, g, q, c)
    for label, a, e in zip(('out', *NAMES), have, wanted):
        assert_close(
            a, e, rtol=1e-4, atol=1e-4, msg=lambda m, k=label: f'{k}: {m}'
        )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', ['plain', 'odd', 'one_group', 'no_query'])
def test_autocast_is_as_good_as_the_reference(name, dtype):
    """Errors against float32 at most twice those of the reference."""
    b, n, g, _, c, q, _, _ = SIZES[name]
    inputs = make_inputs(SIZES[name], scale=0.5)
    upstream = torch.randn(b, n, g, q, c)
    exact = run(inputs, upstream, 'reference')
    with torch.autocast('cpu', dtype):
        reference = run(inputs, upstream, 'reference')
        have = run(inputs, upstream, 'torch')
    assert have[0].dtype == reference[0].dtype == dtype
    for label, a, r, e in zip(('out', *NAMES), have, reference, exact):
        if not e.numel():
            continue
        assert a.isfinite().all(), label
        error, allowed = (a - e).norm(), 2 * (r - e).norm()
        assert error <= allowed + 1e-3 * e.norm(), label


@pytest.mark.parametrize('backend', ['reference', 'torch'])
def test_statistics_are_float32_for_large_values_in_autocast(backend):
    """bfloat16 statistics of numbers around 100 would be far off."""
    inputs = make_inputs(SIZES['plain'])
    inputs[0] = (inputs[0] + 100).detach()
    with torch.autocast('cpu', torch.bfloat16):
        out = call(inputs, backend)
    # Rebuild the second half from the first product, taken as it is.
    x, weights = (t.detach().bfloat16() for t in inputs)
    channel, spatial = split_weights(weights, *x.shape[-2:])
    y = (x @ channel).float()
    y = torch.nn.functional.layer_norm(y, y.shape[-2:]).relu().bfloat16()
    z = (spatial @ y).float()
    z = torch.nn.functional.layer_norm(z, z.shape[-2:]).relu().bfloat16()
    assert_close(out, z, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('name', ['plain', 'odd'])
def test_large_offset(name):
    """Features far from zero: variances must not cancel."""
    inputs = make_inputs(SIZES[name])
    with torch.no_grad():
        inputs[0] += 1000
    b, n, g, _, c, q, _, _ = SIZES[name]
    upstream = torch.randn(b, n, g, q, c)
    double = [t.detach().double() for t in inputs]
    wanted = run(double, upstream, 'reference')[0].float()
    for backend in ('reference', 'torch'):
        have = run(inputs, upstream, backend)[0]
        assert_close(have, wanted, rtol=1e-3, atol=1e-3)


def strided(tensor):
    """The same numbers with other strides and neighbours between them."""
    wide = torch.full((*tensor.shape, 2), float('nan'), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


@pytest.mark.parametrize('backend', ['reference', 'torch'])
def test_non_contiguous(backend):
    inputs = [t.detach() for t in make_inputs(SIZES['odd'])]
    odd = [strided(t) for t in inputs]
    odd[0] = inputs[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not any(t.is_contiguous() for t in odd)
    assert_close(call(odd, backend), call(inputs, backend))


@pytest.mark.parametrize('backend', ['reference', 'torch'])
def test_input_used_twice(backend):
    """One tensor in two places collects both gradients; none is changed."""
    x = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    upstream = torch.randn_like(x)
    for same in (True, False):
        other = x if same else x.detach().clone().requires_grad_()
        weights = torch.cat([other, other], -1).flatten(-2)
        out = adaptive_mixing(x, weights, backend=backend)
        (grad,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
        if same:
            total = grad
        else:
            rest = torch.autograd.grad(out, other, upstream)[0]
            assert_close(total, grad + rest)
    assert_close(x.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize('backend', ['reference', 'torch'])
@pytest.mark.parametrize('side', ['channel', 'spatial'])
def test_one_side_only(side, backend):
    x, weights, *factors = make_inputs(SIZES['odd'], torch.float64)
    part = LowRank(*(factors[:3] if side == 'channel' else factors[3:]))
    have = adaptive_mixing(
        x, weights, **{f'{side}_low_rank': part}, backend=backend
    )
    for unused in factors[3:] if side == 'channel' else factors[:3]:
        unused.data.zero_()
    assert_close(have, formula([x, weights, *factors]))


def test_eps():
    inputs = make_inputs(SIZES['plain'], torch.float64)
    small = adaptive_mixing(*inputs, eps=1e-5)
    large = adaptive_mixing(*inputs, eps=10.0)
    assert (large - small).abs().max() > 0.1
    reference = adaptive_mixing(*inputs, eps=10.0, backend='reference')
    assert_close(large, reference)


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
def test_shapes_that_do_not_fit(name):
    index, shape, message = BAD[name]
    inputs = make_inputs((2, 3, 2, 8, 6, 10, 2, 3))
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(inputs, 'auto')


def test_unknown_backend():
    inputs = make_inputs(SIZES['plain'])
    with pytest.raises(ValueError, match="backend='cuda' is no backend"):
        call(inputs, 'cuda')
