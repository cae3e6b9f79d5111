"""Run the Triton kernels under the interpreter and print their errors.

The interpreter is chosen by a variable before Triton is imported, so this is
a program of its own, which the tests start. It prints a dictionary of
errors, relative to the reference in float64.
"""

import json
import os

import torch

# B, N, G, P, C, Q, K of the channel side, K of the spatial side, r
MIXING = {
    'adamixer': (1, 1, 1, 32, 64, 128, 0, 0, 1),
    'odd': (1, 1, 2, 36, 24, 40, 3, 2, 3),
    'channel side only': (2, 1, 1, 5, 20, 7, 1, 0, 4),
    'spatial side only': (1, 2, 1, 20, 16, 70, 0, 2, 16),
    'lors': (1, 1, 1, 64, 128, 128, 3, 3, 16),
    'more than at a time': (2, 2, 2, 4, 4, 4, 1, 1, 2),
    'no queries': (2, 0, 2, 16, 16, 16, 1, 1, 2),
}
HALF = ('odd', 'adamixer')
SMALL = (1, 1, 1, 3, 4, 5, 1, 1, 2)
# B, N, G, P, C, sizes of the levels
SAMPLING = {
    'small': (2, 1, 2, 3, 12, [(9, 7), (5, 4), (3, 2), (2, 1)]),
    'lors': (1, 1, 1, 64, 128, [(6, 8), (3, 4)]),
    'odd': (1, 2, 1, 36, 24, [(9, 7)]),
    'no queries': (1, 0, 1, 36, 24, [(9, 7)]),
}
NAMES = ['x', 'weights']
NAMES += [f'{side}_{n}' for side in 'cs' for n in ('left', 'core', 'right')]


def random(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def mixing_inputs(case, dtype):
    b, n, g, p, c, q, k_c, k_s, r = case
    draw = random()

    def low_rank(k, rows, cols):
        if not k:
            return [None] * 3
        parts = (g, k, rows, r), (b, n, g, k, r, r), (g, k, r, cols)
        return [draw(*shape) * 0.5 for shape in parts]

    inputs = [draw(b, n, g, p, c) + 0.5, draw(b, n, g, c * c + q * p) * 0.5]
    inputs += low_rank(k_c, c, c) + low_rank(k_s, q, p)
    inputs = [t if t is None else t.to(dtype) for t in inputs]
    return inputs, draw(b, n, g, q, c).to(dtype)


def formula(x, weights, cl, ce, cr, sl, se, sr, eps=1e-5):
    """The papers' formula, in the type of the inputs but for the norms."""
    p, c = x.shape[-2:]
    channel = weights[..., : c * c].unflatten(-1, (c, c))
    spatial = weights[..., c * c :].unflatten(-1, (-1, p))
    if cl is not None:
        channel = channel + (cl @ ce @ cr).sum(-3)
    if sl is not None:
        spatial = spatial + (sl @ se @ sr).sum(-3)

    def norm_relu(y):
        high = y.to(torch.promote_types(y.dtype, torch.float32))
        centred = high - high.mean((-2, -1), keepdim=True)
        var = centred.square().mean((-2, -1), keepdim=True)
        return (centred * (var + eps).rsqrt()).relu().to(y.dtype)

    return norm_relu(spatial @ norm_relu(x @ channel))


def with_gradients(function, inputs, grad_out):
    leaves = [t if t is None else t.requires_grad_() for t in inputs]
    out = function(*leaves)
    used = [t for t in leaves if t is not None]
    return [out, *torch.autograd.grad(out, used, grad_out)]


def error(value, truth):
    """Relative error, infinite for what is not finite."""
    if not truth.numel():
        return 0.0 if value.shape == truth.shape else float('inf')
    value = value.double()
    gap = (value - truth).norm() / truth.norm().clamp_min(1e-12)
    return gap.item() if value.isfinite().all() else float('inf')


def mixing_errors(case, dtype, steps=False):
    """Errors of the kernels, and of PyTorch in the same type."""
    from lors_plugin.ops.adaptive_mixing.triton import launch

    kept = launch.on_chip
    if not steps:
        launch.on_chip = lambda *_: True
    inputs, grad_out = mixing_inputs(case, dtype)
    given = *inputs[:2], inputs[2:]
    out, stats = launch.forward(*given, 1e-5)
    launch.on_chip = kept
    grads = launch.backward(grad_out, *given, stats, 1e-5)
    names = [n for n, t in zip(NAMES, inputs) if t is not None]
    mine = [out, *[g for g in grads if g is not None]]
    double = [t if t is None else t.double() for t in inputs]
    truth = with_gradients(formula, double, grad_out.double())
    plain = with_gradients(formula, inputs, grad_out)
    return {
        name: (error(a, t), error(b, t))
        for name, a, b, t in zip(['out', *names], mine, plain, truth)
    }


def below_80(case):
    """Errors of what runs where Triton has no tensor cores.

    With slices of 8 numbers, which Triton has from 3.8 on, and without.
    """
    from lors_plugin.ops.adaptive_mixing.triton import launch as kernels

    kept = kernels.capability, kernels.SHORT_SLICES
    found = {}
    for short in sorted({False, kernels.SHORT_SLICES}):
        kernels.capability, kernels.SHORT_SLICES = lambda _: 70, short
        for dtype in (torch.float16, torch.float32):
            errors = mixing_errors(case, dtype, steps=True)
            name = f'{str(dtype)[6:]}, short slices: {short}'
            found[name] = errors
    kernels.capability, kernels.SHORT_SLICES = kept
    return found


def sampling_inputs(case, dtype):
    b, n, g, p, c, sizes = case
    draw = random()
    feats = [draw(b, g * c, h, w).to(dtype) for h, w in sizes]
    height, width = sizes[0]
    scale = torch.tensor([4.0 * width, 4.0 * height, 3.0])
    points = (0.5 + 0.5 * draw(b, n, g, p, 3)) * scale
    return feats, points, [4, 8, 16, 32][: len(sizes)], draw(b, n, g, p, c)


def sampling_kernels(feats, points, strides, grad_out=None):
    """The result, the gradient of the points and those of the levels."""
    from lors_plugin.ops.sampling_3d import triton_kernels
    from lors_plugin.ops.sampling_3d.level_gradients import table_gradient
    from lors_plugin.ops.sampling_3d.table import make_table

    levels = make_table(feats, feats[0].dtype)
    sizes = [size for shape in levels.spatial_shapes for size in shape]
    args = levels.table, points, sizes, strides
    out = triton_kernels.forward(*args)
    grad_out = out if grad_out is None else grad_out
    grad_points = triton_kernels.points_gradient(grad_out, *args)
    # Sums of many rows: in float32, whatever the levels are in.
    terms = [(grad_out.float(), points)]
    grad_table = table_gradient(terms, levels.table.shape, sizes, strides)
    grads = levels._replace(table=grad_table).maps()
    return out, grad_points, [g.to(f.dtype) for g, f in zip(grads, feats)]


def sampling_errors(case, dtype):
    from lors_plugin.ops.sampling_3d import reference

    feats, points, strides, grad_out = sampling_inputs(case, dtype)
    out, grad_points, grads = sampling_kernels(
        feats, points, strides, grad_out.to(dtype)
    )
    truth = with_gradients(
        lambda where, *maps: reference.sampling_3d_reference(
            list(maps), where, strides
        ),
        [points.double(), *[feat.double() for feat in feats]],
        grad_out.to(dtype).double(),
    )
    names = ['out', 'points', *[f'level {i}' for i in range(len(feats))]]
    values = [out, grad_points, *grads]
    return {n: error(a, t) for n, a, t in zip(names, values, truth)}


def far_away():
    """Points that no integer can hold, and NaN: zero, and no crash."""
    feats = [torch.ones(1, 16, 3, 4)]
    points = torch.full((1, 1, 1, 4, 3), 2.0)
    far = (float('nan'), 1e30, -1e30)
    points[0, 0, 0, :3, 0] = torch.tensor(far)
    out, grad, _ = sampling_kernels(feats, points, [4])
    return dict(
        outside=out[0, 0, 0, :3].abs().max().item(),
        inside=out[0, 0, 0, 3].mean().item(),
        gradient=grad[0, 0, 0, :3, :2].abs().max().item(),
    )


def repeated():
    """Largest difference between two runs: there must be none."""
    from lors_plugin.ops.adaptive_mixing import triton

    inputs, grad_out = mixing_inputs(
        (1, 2, 1, 4, 8, 6, 2, 1, 2), torch.float32
    )
    given = *inputs[:2], inputs[2:]
    runs = []
    for _ in range(2):
        out, stats = triton.forward(*given, 1e-5)
        grads = triton.backward(grad_out, *given, stats, 1e-5)
        runs.append([out, *grads])
    return max((a - b).abs().max().item() for a, b in zip(*runs))


def public():
    """Errors of the public functions with ``backend='triton'``."""
    from lors_plugin.ops import LowRank, adaptive_mixing, sampling_3d

    inputs, grad_out = mixing_inputs(SMALL, torch.float32)
    double = [t.double() for t in inputs]

    def mix(x, weights, *parts):
        low = LowRank(*parts[:3]), LowRank(*parts[3:])
        return adaptive_mixing(x, weights, *low, backend='triton')

    mine = with_gradients(mix, inputs, grad_out)
    truth = with_gradients(formula, double, grad_out.double())
    found = {n: error(a, t) for n, a, t in zip(NAMES, mine[1:], truth[1:])}
    found['mixed'] = error(mine[0], truth[0])

    feats, points, strides, grad_out = sampling_inputs(
        SAMPLING['small'], torch.float32
    )

    def sample(backend, kind):
        leaves = [t.to(kind) for t in (points, *feats)]
        return with_gradients(
            lambda where, *maps: sampling_3d(
                list(maps), where, strides, backend=backend
            ),
            leaves,
            grad_out.to(kind),
        )

    runs = sample('triton', torch.float32), sample('reference', torch.float64)
    for i, (value, true) in enumerate(zip(*runs)):
        found[f'sampling {i}'] = error(value.detach(), true.detach())
    return found


def registered():
    """What opcheck says of the operators with ``backend='triton'``."""
    from lors_plugin.ops.adaptive_mixing import op as mixing
    from lors_plugin.ops.sampling_3d import op as sampling
    from lors_plugin.ops.sampling_3d.table import make_table

    inputs, _ = mixing_inputs(SMALL, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    plain = [t.detach() for t in inputs]
    out, stats = mixing.mixing_forward(*plain, 1e-5, 'triton')
    feats, points, strides, _ = sampling_inputs(
        (1, 1, 1, 2, 16, [(3, 4), (2, 2)]), torch.float32
    )
    sizes = [size for feat in feats for size in feat.shape[2:]]
    table = make_table(feats, torch.float32).table
    grad = torch.randn(1, 1, 1, 2, 16)
    cases = dict(
        mixing=(mixing.mixing_forward, (*leaves, 1e-5, 'triton')),
        mixing_backward=(
            mixing.mixing_backward,
            (torch.randn_like(out), *plain, stats, 1e-5, 'triton'),
        ),
        sampling=(
            sampling.sampling_forward,
            (
                table.clone().requires_grad_(),
                points.clone().requires_grad_(),
                sizes,
                strides,
                'triton',
            ),
        ),
        sampling_backward=(
            sampling.sampling_backward,
            (grad, table, points, sizes, strides, [True, True], 'triton'),
        ),
    )
    return {
        name: sorted(set(torch.library.opcheck(*case).values()))
        for name, case in cases.items()
    }


def compiled():
    """Errors of one graph, forward and backward, against the formula."""
    from lors_plugin.ops import LowRank, adaptive_mixing

    def mix(x, weights, *parts):
        low = LowRank(*parts[:3]), LowRank(*parts[3:])
        return adaptive_mixing(x, weights, *low, backend='triton')

    graph = torch.compile(mix, fullgraph=True, backend='aot_eager')
    inputs, grad_out = mixing_inputs(SMALL, torch.float32)
    double = [t.double() for t in inputs]
    mine = with_gradients(graph, inputs, grad_out)
    truth = with_gradients(formula, double, grad_out.double())
    return {n: error(a, t) for n, a, t in zip(['out', *NAMES], mine, truth)}


def main():
    mixing, half, single = {}, torch.float16, torch.float32
    for name, case in MIXING.items():
        mixing[f'{name}: steps'] = mixing_errors(case, single, steps=True)
        mixing[f'{name}: on chip'] = mixing_errors(case, single)
        if name in HALF:
            mixing[f'{name}: half'] = mixing_errors(case, half)
    mixing['below 8.0'] = below_80((1, 1, 1, 20, 24, 12, 2, 1, 3))
    others = {
        f'{name}: float': sampling_errors(case, single)
        for name, case in SAMPLING.items()
    }
    others['lors: half'] = sampling_errors(SAMPLING['lors'], half)
    others['far away'] = far_away()
    others['repeated'] = repeated()
    others['public'] = public()
    others['opcheck'] = registered()
    others['compiled'] = compiled()
    print(json.dumps(dict(mixing=mixing, others=others)))


if __name__ == '__main__':
    assert os.environ.get('TRITON_INTERPRET') == '1'
    main()
