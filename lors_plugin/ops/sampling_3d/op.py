"""3D sampling as operators of PyTorch: registration and gradients.

The gradient of the levels is as large as the levels, whatever the number of
points. Stages that sample the same levels would each make one and autograd
would add them up, which costs more than all the sampling. So each call may
have *tokens*: empty outputs of :func:`make_tokens` whose gradients carry what
flows back into the call and where it read. The backward of
:func:`make_tokens` has them all and makes one gradient in one pass. Nothing
is kept between calls, so backward may run twice, in part, or after stages
were recomputed.
"""

import torch
from torch.library import custom_op

from . import fused, level_gradients

TOKENS = 3  # a call: what flows back, where it read, how often it was used


def _kernels(backend):
    if backend == 'torch':
        return fused
    from . import triton_kernels

    return triton_kernels


@custom_op(
    'lors_plugin::sampling_3d_pack',
    mutates_args=(),
    schema='(Tensor[] feats, ScalarType dtype) -> Tensor',
)
def pack(feats, dtype):
    """See :func:`fused.pack`. Gradients go through tokens."""
    return fused.pack(feats, dtype)


@pack.register_fake
def _(feats, dtype):
    cells = sum(
        feat.shape[0] * feat.shape[2] * feat.shape[3] for feat in feats
    )
    return feats[0].new_empty(cells, feats[0].shape[1], dtype=dtype)


@custom_op(
    'lors_plugin::sampling_3d_points_gradient',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor table, Tensor points, SymInt[] sizes, '
    'int[] strides, str backend) -> Tensor',
)
def points_gradient(grad_out, table, points, sizes, strides, backend):
    """See :func:`fused.points_gradient`."""
    run = _kernels(backend).points_gradient
    return run(grad_out, table, points, sizes, strides)


@points_gradient.register_fake
def _(grad_out, table, points, sizes, strides, backend):
    return points.new_empty(points.shape)


@custom_op(
    'lors_plugin::sampling_3d_levels_gradient',
    mutates_args=(),
    schema='(Tensor[] grad_outs, Tensor[] points, Tensor[] counts, '
    'SymInt[] sizes, int[] strides, bool[] planar) -> Tensor[]',
)
def levels_gradient(grad_outs, points, counts, sizes, strides, planar):
    """See :func:`.level_gradients.levels_gradient`.

    ``counts`` says how often each call was made, which must be once: autograd
    adds gradients of several uses, and the sum of two places is no place. A
    compiled program may have zeros for a call that no loss depends on.
    """
    if counts[0].device.type in ('cpu', 'cuda'):
        # Asking a GPU would make the program wait for it; this asserts there.
        torch._assert_async(
            (torch.cat(counts) <= 1).all(),
            'levels from share_levels were sampled twice; each of the list '
            'it returns is for one call of sampling_3d',
        )
    return level_gradients.levels_gradient(
        grad_outs, points, sizes, strides, planar
    )


@levels_gradient.register_fake
def _(grad_outs, points, counts, sizes, strides, planar):
    batch, _, groups, _, width = grad_outs[0].shape
    grads = []
    for height, columns, in_planes in zip(sizes[::2], sizes[1::2], planar):
        if in_planes:
            shape = batch, groups * width, height, columns
            grads.append(grad_outs[0].new_empty(shape))
        else:
            shape = batch, height, columns, groups * width
            grad = grad_outs[0].new_empty(shape)
            grads.append(grad.permute(0, 3, 1, 2))
    return grads


@custom_op(
    'lors_plugin::sampling_3d_tokens',
    mutates_args=(),
    schema='(Tensor[] feats, ScalarType dtype, SymInt[] shapes, '
    'int[] strides) -> Tensor[]',
)
def make_tokens(feats, dtype, shapes, strides):
    """Three tokens for each call to come.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, D, H_l, W_l).
        dtype (torch.dtype): Of the table.
        shapes (Sequence[int]): B, N, G and P of each call in turn.
        strides (Sequence[int]): As in :func:`fused.sample`.

    Returns:
        list[Tensor]: Of each call in turn tokens of shape (B, N, G, P, C),
        (B, N, G, P, 3) and (1, ), which take no memory.
    """
    return _zero_tokens(feats[0], dtype, shapes)


@make_tokens.register_fake
def _(feats, dtype, shapes, strides):
    return _zero_tokens(feats[0], dtype, shapes)


def _zero_tokens(feat, dtype, shapes):
    tokens = []
    for i in range(0, len(shapes), 4):
        shape = tuple(shapes[i : i + 4])
        width = feat.shape[1] // shape[2]
        for size in ((*shape, width), (*shape, 3), (1,)):
            tokens.append(feat.new_zeros(1, dtype=dtype).expand(size))
    return tokens


def _tokens_setup(ctx, inputs, output):
    feats, _, _, ctx.strides = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes = [size for feat in feats for size in feat.shape[2:]]
    ctx.dtypes = [feat.dtype for feat in feats]
    ctx.planar = [feat.is_contiguous() for feat in feats]


def _tokens_backward(ctx, grads):
    used = [
        grads[i : i + TOKENS]
        for i in range(0, len(grads), TOKENS)
        if grads[i] is not None
    ]
    if not used:
        return [None] * len(ctx.dtypes), None, None, None
    values, points, counts = map(list, zip(*used))
    levels = levels_gradient(
        values, points, counts, ctx.sizes, ctx.strides, ctx.planar
    )
    levels = [level.to(kind) for level, kind in zip(levels, ctx.dtypes)]
    return levels, None, None, None


make_tokens.register_autograd(_tokens_backward, setup_context=_tokens_setup)


@custom_op(
    'lors_plugin::sampling_3d_table',
    mutates_args=(),
    schema='(Tensor table, Tensor points, Tensor[] tokens, SymInt[] sizes, '
    'int[] strides, str backend) -> Tensor',
)
def sample(table, points, tokens, sizes, strides, backend):
    """Sample a table; see :func:`fused.sample`.

    Args:
        table (Tensor): As :func:`pack` gives it.
        points (Tensor): Shape (B, N, G, P, 3).
        tokens (Sequence[Tensor]): Of this call; the gradient of the levels
            goes there. Empty where none needs one.
        sizes, strides: As in :func:`fused.sample`.
        backend (str): 'torch' or 'triton'.
    """
    return _kernels(backend).sample(table, points, sizes, strides)


@sample.register_fake
def _(table, points, tokens, sizes, strides, backend):
    batch, queries, groups, number, _ = points.shape
    width = table.shape[1] // groups
    if backend != 'torch':
        return table.new_empty(batch, queries, groups, number, width)
    out = table.new_empty(groups, batch, queries, number, width)
    return out.permute(1, 2, 0, 3, 4)


def _sample_setup(ctx, inputs, output):
    table, points, tokens, ctx.sizes, ctx.strides, ctx.backend = inputs
    ctx.num_tokens = len(tokens)
    ctx.save_for_backward(table, points)


def _sample_backward(ctx, grad_out):
    table, points = ctx.saved_tensors
    grad_points = None
    grad_tokens = [None] * ctx.num_tokens
    if ctx.num_tokens:
        grad_tokens = [grad_out, points, points.new_ones(1)]
    if ctx.needs_input_grad[1]:
        grad_points = points_gradient(
            grad_out, table, points, ctx.sizes, ctx.strides, ctx.backend
        )
    return None, grad_points, grad_tokens, None, None, None


sample.register_autograd(_sample_backward, setup_context=_sample_setup)
