"""Adaptive group mixing: the public function and its checks."""

from functools import reduce
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import select_backend
from ..gradient_sum import GradientSum
from ..low_precision import in_low_precision
from ..packed_linear import can_pack
from . import generated, low_precision
from .op import (
    LowPrecisionMixing,
    SharedGeneratedMixing,
    generated_forward,
    mixing_forward,
)
from .reference import LowRank, adaptive_mixing_reference
from .regenerated import mix_regenerated

# Of the kernels, 128 x 128: more does not fit into registers. Their launcher
# takes it from here, so that nobody imports Triton for it.
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
        weights (Tensor): Generated numbers, shape (B, N, G, C C + Q P);
            ``Q`` follows from the size.
        channel_low_rank (LowRank, optional): Low-rank part of ``M``.
        spatial_low_rank (LowRank, optional): Low-rank part of ``S``.
        eps (float): Added to the variances. Defaults to 1e-5.
        backend (str): 'auto', 'torch', 'triton' or 'reference', see
            :func:`lors_plugin.ops.backend.select_backend`.

    Returns:
        Tensor: Mixed features, shape (B, N, G, Q, C).

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check(x, weights, channel_low_rank, spatial_low_rank)
    dtype = _product_dtype(
        x, weights, *(channel_low_rank or ()), *(spatial_low_rank or ())
    )
    x, weights = x.to(dtype), weights.to(dtype)
    channel_low_rank = _cast(channel_low_rank, dtype)
    spatial_low_rank = _cast(spatial_low_rank, dtype)
    refusal = _too_large(x, weights, channel_low_rank, spatial_low_rank)
    chosen = select_backend(backend, x, refusal)
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
    gradient_sum: Optional[GradientSum] = None,
) -> Tensor:
    """Generate the matrices from queries and mix with them.

    The same as ``linear(query, weight, bias)`` and :func:`adaptive_mixing`,
    to which the contract on types belongs. In one operator, the matrices are
    made in the order in which mixing reads them, and so are their gradients.

    Args:
        x (Tensor): Sampled features, shape (B, N, G, P, C).
        query (Tensor): Content of the queries, shape (B, N, D).
        weight (Tensor): Of the generator, shape (G (C C + Q P), D).
        bias (Tensor, optional): Of the generator, shape (G (C C + Q P), ).
        channel_low_rank (LowRank, optional): Low-rank part of ``M``.
        spatial_low_rank (LowRank, optional): Low-rank part of ``S``.
        eps (float): Added to the variances. Defaults to 1e-5.
        backend (str): As in :func:`adaptive_mixing`.
        gradient_sum (GradientSum, optional): Of ``weight``, where calls of
            one forward pass share it; used where it fits.

    Returns:
        Tensor: Mixed features, shape (B, N, G, Q, C).

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check_generator(x, query, weight, bias)
    parts = *(channel_low_rank or ()), *(spatial_low_rank or ())
    dtype = _product_dtype(x, query, weight, *parts)
    like = x if x.dtype == dtype else x.new_empty(0, dtype=dtype)
    chosen = select_backend(backend, like)
    autocast = torch.is_autocast_enabled(x.device.type)
    in_low = chosen == 'torch' and in_low_precision(weight, x, query, *parts)
    if chosen != 'torch' or (autocast and not in_low):
        # Autocast keeps the cast weight for all stages; kernels read the
        # numbers of a query in one piece.
        if not autocast:
            query, weight = query.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        generated = F.linear(query, weight, bias)
        weights = generated.unflatten(-1, (x.shape[2], -1))
        return adaptive_mixing(
            x, weights, channel_low_rank, spatial_low_rank, eps, backend
        )
    points, width = x.shape[-2:]
    rows = (weight.shape[0] // x.shape[2] - width**2) // points
    _check_parts(x, rows, channel_low_rank, spatial_low_rank)
    none = (None,) * 3
    factors = (
        *(_cast(channel_low_rank, dtype) or none),
        *(_cast(spatial_low_rank, dtype) or none),
    )
    if in_low:
        x, query = x.to(dtype), query.to(dtype)
        return _low(x, query, weight, bias, factors, eps, gradient_sum)
    tensors = (
        x.to(dtype),
        query.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        *factors,
    )
    if gradient_sum is None or weight.dtype != dtype:
        return generated_forward(*tensors, eps)[0]
    return _shared(*tensors, eps=eps, gradient_sum=gradient_sum)


def _shared(x, query, weight, bias, *factors, eps, gradient_sum):
    if gradient_sum.remembered is not None and gradient_sum.fits(weight):
        args = x, query, weight, bias, factors, eps, gradient_sum
        return mix_regenerated(*args)
    packed = token = None
    queries = x.shape[0] * x.shape[1]
    if not gradient_sum.save_memory and can_pack(weight, queries):
        sizes = x.shape[2], x.shape[4], queries

        def pack():
            with torch.no_grad(), torch.autocast('cpu', enabled=False):
                return generated.pack(weight, bias, *sizes)

        packed = gradient_sum.make(('packed', *sizes), pack)
    tensors = x, query, weight, bias, *factors
    if gradient_sum.fits(weight):
        token = gradient_sum.take(weight, bias)
        weight = weight.detach()
    elif packed is None:
        return generated_forward(*tensors, eps)[0]
    if not torch.is_grad_enabled():
        args = x, query, bias, packed, factors, eps
        return generated.forward_packed(*args, keep=False)[0]
    out, token = SharedGeneratedMixing.apply(
        token, eps, packed, x, query, weight, bias, *factors
    )
    if token is not None:
        gradient_sum.give(token)
    return out


def _low(x, query, weight, bias, factors, eps, gradient_sum):
    def cast():
        with torch.no_grad():
            return low_precision.cast(weight, bias, x.dtype)

    low = cast() if gradient_sum is None else gradient_sum.make(x.dtype, cast)
    token = products = None
    if gradient_sum is not None and gradient_sum.fits(weight):
        token = gradient_sum.take(weight, bias)
        products = gradient_sum.products
        weight = weight.detach()
        if products is not None and bias is not None:
            bias = bias.detach()
    out, token = LowPrecisionMixing.apply(
        token, eps, low, products, x, query, weight, bias, *factors
    )
    if token is not None:
        gradient_sum.give(token)
    return out


def _check_generator(x, query, weight, bias):
    if x.dim() != 5:
        raise ValueError(
            f'x must have shape (B, N, G, P, C), got {tuple(x.shape)}'
        )
    batch, queries, groups, points, width = x.shape
    if query.dim() != 3 or tuple(query.shape[:2]) != (batch, queries):
        raise ValueError(
            f'query must have shape {(batch, queries, "D")} for x of shape '
            f'{tuple(x.shape)}, got {tuple(query.shape)}'
        )
    numbers = weight.shape[0]
    spatial = numbers - groups * width**2
    if (
        tuple(weight.shape[1:]) != tuple(query.shape[2:])
        or not points
        or spatial < groups * points
        or spatial % (groups * points)
    ):
        raise ValueError(
            'weight must have shape '
            f'{(f"{groups} ({width**2} + {points} Q)", query.shape[2])} for '
            f'x of shape {tuple(x.shape)}, got {tuple(weight.shape)}'
        )
    if bias is not None and tuple(bias.shape) != (numbers,):
        raise ValueError(
            f'bias must have shape {(numbers,)}, got {tuple(bias.shape)}'
        )


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    device = tensors[0].device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
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
        numbers = weights.shape[-1] - width**2
        out_points, rest = numbers // points, numbers % points
    if tuple(weights.shape[:-1]) != tuple(lead) or out_points < 1 or rest:
        raise ValueError(
            f'weights must have shape {(*lead, f"{width**2} + {points} Q")} '
            f'for x of shape {tuple(x.shape)}, got {tuple(weights.shape)}'
        )
    _check_parts(x, out_points, channel_low_rank, spatial_low_rank)


def _too_large(
    x: Tensor,
    weights: Tensor,
    channel_low_rank: Optional[LowRank],
    spatial_low_rank: Optional[LowRank],
) -> str:
    """Why the kernels, which keep whole matrices, cannot take the sizes."""
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
        f'the kernels hold tiles of {LARGEST_TILE} numbers, too few for {text}'
    )


def _check_parts(x, out_points, channel_low_rank, spatial_low_rank):
    *lead, points, width = x.shape
    for name, part, rows, cols in (
        ('channel_low_rank', channel_low_rank, width, width),
        ('spatial_low_rank', spatial_low_rank, out_points, points),
    ):
        if part is not None:
            _check_low_rank(name, part, lead, rows, cols)


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
