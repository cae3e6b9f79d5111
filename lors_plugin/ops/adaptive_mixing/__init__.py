"""Adaptive group mixing: the public functions and their checks.

``reference.py`` defines what is right. Three implementations compute it behind
one registered operator (``op.py``): ``torch_impl.py`` (chunked PyTorch, any
device), ``cpu_impl.py`` (C++, float32 on CPUs) and ``triton`` (NVIDIA GPUs).
"""

from functools import reduce
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backend import select_backend
from . import cpu_impl
from .op import mixing_forward
from .reference import LowRank, adaptive_mixing_reference

# Elements of the largest tile of the Triton kernels, 128 x 128: more does not
# fit into registers. It is here because only their launcher imports Triton.
LARGEST_TILE = 2**14

__all__ = ['LowRank', 'adaptive_mixing', 'generated_mixing']


def adaptive_mixing(
    x: Tensor,
    weights: Tensor,
    channel_low_rank: Optional[LowRank] = None,
    spatial_low_rank: Optional[LowRank] = None,
    eps: float = 1e-5,
    backend: str = 'auto',
) -> Tensor:
    """Mix sampled features with matrices made from each query.

    AdaMixer, section 3.2 (adaptive channel mixing, then adaptive spatial
    mixing), with the private low-rank parts of LORS, section 3.3. The
    weights of a query and group are a channel matrix ``M`` of shape (C, C)
    and a spatial matrix ``S`` of shape (Q, P), one after the other::

        y = relu(LN(x M)),  z = relu(LN(S y))

    Both layer norms run over the last two dimensions together and have no
    weights. With low-rank parts, ``M`` stands for
    ``M + sum_k left_k core_k right_k`` and ``S`` alike.

    Products run in the type of autocast where it is enabled, else in the
    type that the inputs promote to; so does the output, which a linear layer
    can take as it is. Statistics are float32 (float64 for float64). As
    everywhere in PyTorch, autocast leaves float64 alone.

    Args:
        x (Tensor): Sampled features, shape (B, N, G, P, C).
        weights (Tensor): Generated elements of both matrices, shape
            (B, N, G, C C + Q P); ``Q`` follows from the size.
        channel_low_rank (LowRank, optional): Low-rank part of ``M``.
        spatial_low_rank (LowRank, optional): Low-rank part of ``S``.
        eps (float): Added to the variances. Defaults to 1e-5.
        backend (str): 'auto', 'torch', 'cpu', 'triton' or 'reference', see
            :func:`lors_plugin.ops.backend.select_backend`. 'auto' takes
            Triton on NVIDIA GPUs where it was checked, C++ for float32 on
            CPUs and PyTorch otherwise.

    Returns:
        Tensor: Mixed features, shape (B, N, G, Q, C).

    Raises:
        ValueError: If shapes do not fit together.
        RuntimeError: If ``backend`` names an implementation that cannot run
            here.
    """
    _check(x, weights, channel_low_rank, spatial_low_rank)
    dtype = _product_dtype(
        x, weights, *(channel_low_rank or ()), *(spatial_low_rank or ())
    )
    x, weights = x.to(dtype), weights.to(dtype)
    channel_low_rank = _cast(channel_low_rank, dtype)
    spatial_low_rank = _cast(spatial_low_rank, dtype)
    chosen = select_backend(
        backend,
        x,
        _too_large(x, weights, channel_low_rank, spatial_low_rank),
        cpu_impl.refusal(x, weights),
        'low_rank_mixing'
        if channel_low_rank or spatial_low_rank
        else 'mixing',
    )
    if chosen == 'reference':
        return adaptive_mixing_reference(
            x, weights, channel_low_rank, spatial_low_rank, eps
        )
    none = (None,) * 3
    return mixing_forward(
        x,
        weights,
        *(channel_low_rank or none),
        *(spatial_low_rank or none),
        eps,
        chosen,
    )[0]


def generated_mixing(
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    channel_low_rank: Optional[LowRank] = None,
    spatial_low_rank: Optional[LowRank] = None,
    eps: float = 1e-5,
    backend: str = 'auto',
    recompute: bool = False,
) -> Tensor:
    """Generate the matrices from the queries and mix with them.

    The same as ``linear(query, weight, bias)``, the generator, followed by
    :func:`adaptive_mixing`, to which the contract on types belongs.

    Args:
        x (Tensor): Sampled features, shape (B, N, G, P, C).
        query (Tensor): Content of the queries, shape (B, N, D).
        weight (Tensor): Of the generator, shape (G (C C + Q P), D).
        bias (Tensor, optional): Of the generator, shape (G (C C + Q P), ).
        channel_low_rank (LowRank, optional): Low-rank part of ``M``.
        spatial_low_rank (LowRank, optional): Low-rank part of ``S``.
        eps (float): Added to the variances. Defaults to 1e-5.
        backend (str): As in :func:`adaptive_mixing`.
        recompute (bool): Generate and mix again in the backward pass instead
            of keeping the matrices. Defaults to False.

    Returns:
        Tensor: Mixed features, shape (B, N, G, Q, C).

    Raises:
        ValueError: If shapes do not fit together.
    """
    groups = x.shape[2] if x.dim() == 5 else 0
    if not groups or weight.shape[0] % groups:
        raise ValueError(
            'weight must have shape (G (C C + Q P), D) for x of shape '
            f'(B, N, G, P, C), got {tuple(weight.shape)} for '
            f'{tuple(x.shape)}'
        )
    if recompute:
        return checkpoint(
            generated_mixing,
            *(x, query, weight, bias, channel_low_rank, spatial_low_rank),
            *(eps, backend),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    weights = F.linear(query, weight, bias).unflatten(-1, (groups, -1))
    return adaptive_mixing(
        x, weights, channel_low_rank, spatial_low_rank, eps, backend
    )


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    device = tensors[0].device.type
    if (
        dtype != torch.float64
        and torch.amp.is_autocast_available(device)  # not so for 'meta'
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return dtype


def _cast(part: Optional[LowRank], dtype: torch.dtype) -> Optional[LowRank]:
    return part and LowRank(*(factor.to(dtype) for factor in part))


def _check(x, weights, channel_low_rank, spatial_low_rank):
    if x.dim() != 5:
        raise ValueError(
            f'x must have shape (B, N, G, P, C), got {tuple(x.shape)}'
        )
    *lead, points, width = x.shape
    out_points, rest = 0, 0
    if weights.dim() == 4 and points:
        # Not `divmod`, which the compiler does not know for dynamic shapes.
        size = weights.shape[-1] - width**2
        out_points, rest = size // points, size % points
    if tuple(weights.shape[:-1]) != tuple(lead) or out_points < 1 or rest:
        raise ValueError(
            f'weights must have shape {(*lead, f"{width**2} + {points} Q")} '
            f'for x of shape {tuple(x.shape)}, got {tuple(weights.shape)}'
        )
    for name, part, rows, cols in (
        ('channel_low_rank', channel_low_rank, width, width),
        ('spatial_low_rank', spatial_low_rank, out_points, points),
    ):
        if part is not None:
            _check_low_rank(name, part, lead, rows, cols)


def _too_large(
    x: Tensor,
    weights: Tensor,
    channel_low_rank: Optional[LowRank],
    spatial_low_rank: Optional[LowRank],
) -> str:
    """Say why the Triton kernels, which hold whole matrices, cannot run."""
    if x.device.type != 'cuda':
        return ''
    points, width = x.shape[-2:]
    spatial = (weights.shape[-1] - width**2) // points
    # The cores of all groups are one square matrix of side K r.
    ranks = [
        part.core.shape[-3] * part.core.shape[-1]
        for part in (channel_low_rank, spatial_low_rank)
        if part is not None
    ]
    columns, rows, *sides = (
        max(16, 1 << (n - 1).bit_length())
        for n in (width, max(width, points, spatial), *ranks)
    )
    tiles = columns * rows, *(side * side for side in sides)
    if max(tiles) <= LARGEST_TILE:
        return ''
    text = f'C {width}, P {points}, Q {spatial}'
    text += ''.join(f', K r {rank}' for rank in ranks)
    return (
        f'the kernels hold tiles of {LARGEST_TILE} elements, too few for '
        f'{text}'
    )


def _check_low_rank(name, part, lead, rows, cols):
    batch, queries, groups = lead
    num, rank = part.left.shape[1], part.left.shape[-1]
    wanted = LowRank(
        (groups, num, rows, rank),
        (batch, queries, groups, num, rank, rank),
        (groups, num, rank, cols),
    )
    for field, want, have in zip(LowRank._fields, wanted, part):
        if tuple(have.shape) != want:
            raise ValueError(
                f'{name}.{field} must have shape {want}, '
                f'got {tuple(have.shape)}'
            )
