"""Multiply-adds of operators, from the shapes of their tensors.

One multiply-add is a product that is added to something; it counts as two
FLOPs. Matrix products, convolutions and attention have formulas in PyTorch
(:mod:`torch.utils.flop_counter`). This module adds those of this package's
operators, which PyTorch's ``FlopCounterMode`` then counts too, and those of
other operators that PyTorch leaves out. Additions of biases, norms and
activations are no multiply-adds; :func:`elementwise_results` counts them.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import lors_plugin.ops  # noqa: F401  (registers its operators)

MIXING = 'lors_plugin::adaptive_mixing_forward'
# Parts of names of operators that multiply and add and have no formula.
_UNKNOWN = ('fft', 'linalg', 'cdist', 'lstm', 'gru', 'rnn', 'quantized')


def low_rank_products(
    rows: int, cols: int, other: int, groups: int, rank: int
) -> tuple[int, int]:
    """Count the multiply-adds of ``sum_k left_k E_k right_k`` in a product.

    Args:
        rows (int): Rows of ``left``.
        cols (int): Columns of ``right``.
        other (int): Vectors that the matrix is applied to.
        groups (int): Parameter groups ``K``.
        rank (int): ``r``.

    Returns:
        tuple[int]: Kept factored, the vectors go through the three factors
        one after the other; formed, the matrix is made and added to the one
        that is there already, at no further product.
    """
    factored = other * (rows * rank + rank**2 + rank * cols)
    formed = rank**2 * min(rows, cols) + rows * rank * cols
    return groups * factored, groups * formed


def mixing_multiply_adds(
    x: Sequence[int],
    generated: Sequence[int],
    channel_core: Optional[Sequence[int]] = None,
    spatial_core: Optional[Sequence[int]] = None,
) -> dict[str, int]:
    """Count the multiply-adds of :func:`lors_plugin.ops.adaptive_mixing`.

    The low-rank part of each matrix is counted the cheaper way, factored or
    formed, so that the count belongs to the method and not to the
    implementation.

    Args:
        x (Sequence[int]): Shape (B, N, G, P, C).
        generated (Sequence[int]): Shape (B, N, G, C C + Q P).
        channel_core (Sequence[int], optional): Shape (B, N, G, K, r, r).
        spatial_core (Sequence[int], optional): Shape (B, N, G, K, r, r).

    Returns:
        dict[str, int]: '' for ``x M`` and ``S y``; 'low_rank'.
    """
    *lead, points, width = x
    out_points = (generated[-1] - width**2) // points
    each = prod(lead)
    low_rank = 0
    for core, rows, cols, other in (
        (channel_core, width, width, points),
        (spatial_core, out_points, points, width),
    ):
        if core is not None:
            groups, rank = core[-3], core[-1]
            low_rank += min(low_rank_products(rows, cols, other, groups, rank))
    products = points * width * width + out_points * points * width
    return {'': each * products, 'low_rank': each * low_rank}


def sampling_multiply_adds(sampled: Sequence[int], num_levels: int) -> int:
    """Count the multiply-adds of :func:`lors_plugin.ops.sampling_3d`.

    Per point, level and channel four of the bilinear interpolation and one
    of the level's weight. Making these weights, some ten operations per
    point and level for all channels, is not counted.

    Args:
        sampled (Sequence[int]): Shape (B, N, G, P, C).
        num_levels (int): ``L``.

    Returns:
        int: The count.
    """
    return prod(sampled) * num_levels * 5


def _mixing(x, weights, c_core, s_core, **_):
    cores = [None if core is None else core.shape for core in (c_core, s_core)]
    return mixing_multiply_adds(x.shape, weights.shape, *cores)


def _sampling(out, strides, **_):
    return {'': sampling_multiply_adds(out.shape, len(strides))}


def _dynamic(weight, attention, out, bias=None, **_):
    """One kernel per image, and the mixing of that kernel."""
    elements = weight.numel() + (0 if bias is None else bias.numel())
    product = out.numel() * weight[0, 0].numel()
    return {'': product + len(attention) * elements}


# Of this package; arguments by name.
_OURS: dict[str, Callable] = {
    MIXING: _mixing,
    'lors_plugin::sampling_3d': _sampling,
    'lors_plugin::dynamic_conv2d': _dynamic,
}


def _grid_sample(x, grid, mode=0, *_, out):
    cells = {0: 2 ** (x.dim() - 2), 2: 16}.get(mode, 0)
    return out.numel() * cells


def _matrix_vector(*args, out, **_):
    matrix = next(a for a in args if isinstance(a, Tensor) and a.dim() == 2)
    return matrix.numel()


def _deform_conv(x, weight, offset, mask, *rest, out):
    # `use_mask` is the last argument.
    batch, _, height, width = out.shape
    each = weight[0, 0].numel() * x.shape[1] * (5 if rest[-1] else 4)
    return out.numel() * weight[0].numel() + batch * height * width * each


def _embedding_bag(weight, indices, *_, out, **__):
    return indices.numel() * weight.shape[1]


def _interpolation(cells: int) -> Callable:
    return lambda *_, out, **__: out.numel() * cells


# Of others, which PyTorch's counter leaves out.
_OTHERS: dict[str, Callable] = {
    'aten::grid_sampler_2d': _grid_sample,
    'aten::grid_sampler_3d': _grid_sample,
    'torchvision::deform_conv2d': _deform_conv,
    'aten::mv': _matrix_vector,
    'aten::addmv': _matrix_vector,
    'aten::addmm_': lambda _, x, y, *__, out, **___: x.numel() * y.shape[1],
    'aten::dot': lambda x, *_, out: x.numel(),
    'aten::vdot': lambda x, *_, out: x.numel(),
    'aten::_embedding_bag': _embedding_bag,
    'aten::_embedding_bag_forward_only': _embedding_bag,
}
# Cells that an interpolated value is made from.
for _name, _cells in dict(
    linear1d=2, bilinear2d=4, bicubic2d=16, trilinear3d=8
).items():
    for _op in (f'_upsample_{_name}', f'upsample_{_name}'):
        _OTHERS[f'aten::{_op}'] = _interpolation(_cells)
        _OTHERS[f'aten::{_op}_aa'] = _interpolation(_cells)


def has_formula(func: Any) -> bool:
    """Return whether the multiply-adds of an operator are known."""
    name = func._schema.name
    known = name in _OURS or name in _OTHERS
    return known or func._overloadpacket in flop_registry


def multiply_adds(
    func: Any, args: tuple, kwargs: dict, out: Any
) -> dict[str, int]:
    """Count one call of an operator that :func:`has_formula`.

    Args:
        func (torch._ops.OpOverload): The operator.
        args (tuple): Positional arguments of the call.
        kwargs (dict): Keyword arguments of the call.
        out (Any): What it returned.

    Returns:
        dict[str, int]: Multiply-adds per kind of work, '' for the main one.
    """
    name = func._schema.name
    first = out[0] if isinstance(out, (tuple, list)) else out
    if name in _OURS:
        names = [argument.name for argument in func._schema.arguments]
        return _OURS[name](**dict(zip(names, args)), **kwargs, out=first)
    if name in _OTHERS:
        return {'': _OTHERS[name](*args, **kwargs, out=first)}
    flops = flop_registry[func._overloadpacket]
    return {'': flops(*args, **kwargs, out_val=out) // 2}


def _register(name: str) -> None:
    """Let PyTorch's ``FlopCounterMode`` count an operator of this package."""
    packet = getattr(torch.ops.lors_plugin, name.split('::')[1], None)
    if packet is None:
        return

    @register_flop_formula(packet, get_raw=True)
    def flops(*args, out_val, **kwargs):
        counts = multiply_adds(packet.default, args, kwargs, out_val)
        return 2 * sum(counts.values())


for _name in _OURS:
    _register(_name)

# Norms, reductions and poolings: one result each, like additions.
_NORMS = (
    'aten::native_layer_norm',
    'aten::native_group_norm',
    'aten::native_batch_norm',
    'aten::_native_batch_norm_legit',
    'aten::_native_batch_norm_legit_no_training',
    'aten::cudnn_batch_norm',
    'aten::_softmax',
    'aten::_log_softmax',
    'aten::avg_pool2d',
    'aten::adaptive_avg_pool2d',
    'aten::_adaptive_avg_pool2d',
    'aten::max_pool2d_with_indices',
    'aten::mean',
    'aten::sum',
    'aten::cumsum',
    'aten::prod',
)  # fmt: skip


def elementwise_results(func: Any, args: tuple, out: Any) -> int:
    """Count the results of a pointwise operator, norm or pooling.

    Args:
        func (torch._ops.OpOverload): The operator.
        args (tuple): Positional arguments of the call.
        out (Any): What it returned.

    Returns:
        int: Floating-point elements of its first result, 0 for an operator
        of another kind. For adaptive mixing those of both norms and both
        ReLUs.
    """
    first = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return 0
    name = func._schema.name
    if name == MIXING:
        return 2 * (args[0].numel() + first.numel())
    if torch.Tag.pointwise in func.tags or name in _NORMS:
        return first.numel()
    return 0


def may_multiply(func: Any) -> bool:
    """Return whether an operator without a formula might need one."""
    name = func._schema.name
    if func.namespace == 'lors_plugin':
        return True
    if func.namespace not in ('aten', 'prim'):
        # One that takes no tensor tells something, such as a version.
        return any('Tensor' in str(a.type) for a in func._schema.arguments)
    return any(part in name for part in _UNKNOWN)
