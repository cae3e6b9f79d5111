"""Adaptive group mixing: the public function and its checks."""

from typing import Optional

from torch import Tensor

from ..backend import resolve_backend
from .fused import adaptive_mixing_fused
from .reference import LowRank, adaptive_mixing_reference

__all__ = ['LowRank', 'adaptive_mixing']

_PATHS = {
    'reference': adaptive_mixing_reference,
    'torch': adaptive_mixing_fused,
}


def adaptive_mixing(
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    channel_low_rank: Optional[LowRank] = None,
    spatial_low_rank: Optional[LowRank] = None,
    eps: float = 1e-5,
    backend: str = 'auto',
) -> Tensor:
    """Mix sampled features with matrices made from each query.

    AdaMixer, section 3.2 (adaptive channel mixing, then adaptive spatial
    mixing), with the private low-rank parts of LORS, section 3.3::

        y = relu(LN(x @ channel)),  z = relu(LN(spatial @ y))

    Both layer norms run over the last two dimensions together and have no
    weights. With low-rank parts, ``channel`` stands for
    ``channel + sum_k left_k core_k right_k`` and ``spatial`` alike.

    Under autocast the products run in the autocast type; the statistics
    and the result of both norms are float32 (float64 for float64 inputs).

    Args:
        x (Tensor): Sampled features, shape (B, N, G, P, C).
        channel (Tensor): Channel mixing matrices, shape (B, N, G, C, C).
        spatial (Tensor): Spatial mixing matrices, shape (B, N, G, Q, P).
        channel_low_rank (LowRank, optional): Low-rank part of ``channel``.
        spatial_low_rank (LowRank, optional): Low-rank part of ``spatial``.
        eps (float): Added to the variances. Defaults to 1e-5.
        backend (str): 'auto', 'torch' or 'reference'. Defaults to 'auto'.

    Returns:
        Tensor: Mixed features, shape (B, N, G, Q, C).

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check(x, channel, spatial, channel_low_rank, spatial_low_rank)
    mix = _PATHS[resolve_backend(backend)]
    return mix(x, channel, spatial, channel_low_rank, spatial_low_rank, eps)


def _check(x, channel, spatial, channel_low_rank, spatial_low_rank):
    if x.dim() != 5:
        raise ValueError(
            f'x must have shape (B, N, G, P, C), got {tuple(x.shape)}'
        )
    *lead, num_points, width = x.shape
    if tuple(channel.shape) != (*lead, width, width):
        raise ValueError(
            f'channel must have shape {(*lead, width, width)} for x of '
            f'shape {tuple(x.shape)}, got {tuple(channel.shape)}'
        )
    out_points = spatial.shape[-2]
    if tuple(spatial.shape) != (*lead, out_points, num_points):
        raise ValueError(
            f'spatial must have shape {(*lead, "Q", num_points)} for x of '
            f'shape {tuple(x.shape)}, got {tuple(spatial.shape)}'
        )
    for name, part, rows, cols in (
        ('channel_low_rank', channel_low_rank, width, width),
        ('spatial_low_rank', spatial_low_rank, out_points, num_points),
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
