"""Adaptive 3D sampling: the public function and its checks."""

from collections.abc import Sequence

from torch import Tensor

from .reference import sampling_3d_reference

__all__ = ['sampling_3d']


def sampling_3d(
    feats: Sequence[Tensor], points: Tensor, strides: Sequence[int]
) -> Tensor:
    """Sample a feature pyramid at points with a scale of their own.

    AdaMixer, section 3.1. A point ``(x, y, z)`` reads every level ``l``
    bilinearly at ``(x, y)`` (zero outside the map) and weighs the levels
    with ``softmax_l(-(z - log2 stride_l)^2 / 2)``. Group ``g`` owns the
    ``g``-th of ``G`` contiguous slices of the channels and its own points.

    Runs in float32 (float64 for float64 inputs), also under autocast.

    Args:
        feats (Sequence[Tensor]): Levels, each of shape (B, D, H_l, W_l).
        points (Tensor): Shape (B, N, G, P, 3): x and y in pixels of the
            input image, z as log2 of pixels.
        strides (Sequence[int]): Pixels a cell of each level.

    Returns:
        Tensor: Shape (B, N, G, P, C), with C = D / G.

    Raises:
        ValueError: If shapes do not fit together.
    """
    if len(feats) != len(strides) or not feats:
        raise ValueError(
            f'{len(feats)} feature levels do not fit '
            f'{len(strides)} strides {tuple(strides)}'
        )
    if points.dim() != 5 or points.shape[-1] != 3:
        raise ValueError(
            'points must have shape (B, N, G, P, 3), '
            f'got {tuple(points.shape)}'
        )
    batch, _, groups = points.shape[:3]
    for level, feat in enumerate(feats):
        if feat.dim() != 4 or feat.shape[0] != batch:
            raise ValueError(
                f'feats[{level}] must have shape (B={batch}, '
                f'D, H, W), got {tuple(feat.shape)}'
            )
        if feat.shape[1] != feats[0].shape[1] or feat.shape[1] % groups:
            raise ValueError(
                f'feats[{level}] has {feat.shape[1]} channels; all levels '
                f'need the same number, divisible by {groups} groups'
            )
    return sampling_3d_reference(feats, points, strides)
