"""Adaptive 3D sampling: the public functions and their checks."""

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

from ..backend import select_backend
from .op import sampling_forward
from .reference import sampling_3d_reference
from .table import SharedLevels, make_table

__all__ = ['SharedLevels', 'sampling_3d', 'share_levels']

MAX_WIDTH = 4096  # channels per group that fit into a tile of the kernels


def sampling_3d(
    feats: Union[Sequence[Tensor], SharedLevels],
    points: Tensor,
    strides: Sequence[int],
    backend: str = 'auto',
) -> Tensor:
    """Sample a feature pyramid at points that choose their own scale.

    AdaMixer, section 3.1. A point ``(x, y, z)`` reads every level ``l``
    bilinearly at ``(x, y)`` (zero outside the map) and weighs the levels
    with ``softmax_l(-(z - log2 stride_l)^2 / 2)``. Group ``g`` owns the
    ``g``-th of ``G`` contiguous slices of the channels and its own points.

    Runs in float32, also under autocast and for levels in half precision
    (float16 cannot resolve the coordinates of large images), and in float64
    if any input is float64.

    Args:
        feats (Sequence[Tensor] | SharedLevels): Levels, each of shape
            (B, D, H_l, W_l), with any strides in memory. Levels that are
            sampled several times should go through :func:`share_levels`
            first.
        points (Tensor): Shape (B, N, G, P, 3): x and y in pixels of the
            input image, z as log2 of pixels.
        strides (Sequence[int]): Pixels per cell of each level.
        backend (str): 'auto', 'torch', 'triton' or 'reference'. Defaults to
            'auto'.

    Returns:
        Tensor: Shape (B, N, G, P, C), with C = D / G.

    Raises:
        ValueError: If shapes do not fit together.
        RuntimeError: If Triton is asked for and cannot run here.
    """
    if isinstance(feats, SharedLevels):
        batch, channels = feats.batch, feats.table.shape[1]
        num_levels, tensors = len(feats.spatial_shapes), [feats.table]
    else:
        _check_levels(feats)
        batch, channels = feats[0].shape[:2]
        num_levels, tensors = len(feats), feats
    _check_strides(num_levels, strides)
    _check_points(points, batch, channels)
    dtype = _compute_dtype(points, *tensors)
    points = points.to(dtype)
    refusal = _refusal(channels // points.shape[2])
    backend = select_backend(backend, points, refusal, operator='sampling')
    if backend == 'reference':
        if isinstance(feats, SharedLevels):
            feats = feats.maps()
        return sampling_3d_reference(feats, points, strides)
    if not isinstance(feats, SharedLevels):
        feats = make_table(feats, dtype)
    return sampling_forward(
        feats.table.to(dtype),
        points,
        [size for shape in feats.spatial_shapes for size in shape],
        list(strides),
        backend,
    )


def share_levels(
    feats: Sequence[Tensor], backend: str = 'auto'
) -> Union[Sequence[Tensor], SharedLevels]:
    """Prepare levels for several calls of :func:`sampling_3d`.

    The levels are converted to the layout of the implementation once rather
    than in each call.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, D, H_l, W_l).
        backend (str): As in :func:`sampling_3d`. Defaults to 'auto'.

    Returns:
        SharedLevels | Sequence[Tensor]: To be given as ``feats`` to any
        number of calls; ``feats`` unchanged for the reference.

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check_levels(feats)
    dtype = _compute_dtype(*feats)
    probe = feats[0].new_empty(0, dtype=dtype)
    chosen = select_backend(backend, probe, operator='sampling')
    if chosen == 'reference':
        return feats
    return make_table(feats, dtype)


def _refusal(width: int) -> str:
    """Say why the kernels cannot take so many channels, '' if they can."""
    if width > MAX_WIDTH:
        return (
            f'the kernels of sampling take up to {MAX_WIDTH} channels per '
            f'group, got {width}'
        )
    return ''


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _check_levels(feats):
    if not len(feats):
        raise ValueError('feats must hold at least one feature level')
    for level, feat in enumerate(feats):
        if feat.dim() != 4:
            raise ValueError(
                f'feats[{level}] must have shape (B, D, H, W), '
                f'got {tuple(feat.shape)}'
            )
        if not feat.shape[2] or not feat.shape[3]:
            raise ValueError(
                f'feats[{level}] of shape {tuple(feat.shape)} has no cells'
            )
        if feat.shape[:2] != feats[0].shape[:2]:
            raise ValueError(
                f'feats[{level}] has {feat.shape[0]} images of '
                f'{feat.shape[1]} channels, feats[0] {feats[0].shape[0]} of '
                f'{feats[0].shape[1]}; all levels must agree in both'
            )


def _check_strides(num_levels, strides):
    if num_levels != len(strides):
        raise ValueError(
            f'{num_levels} feature levels do not fit '
            f'{len(strides)} strides {tuple(strides)}'
        )


def _check_points(points, batch, channels):
    if points.dim() != 5 or points.shape[-1] != 3:
        raise ValueError(
            'points must have shape (B, N, G, P, 3), '
            f'got {tuple(points.shape)}'
        )
    if points.shape[0] != batch:
        raise ValueError(
            f'points of {points.shape[0]} images do not fit levels of '
            f'{batch} images'
        )
    groups = points.shape[2]
    if not groups or channels % groups:
        raise ValueError(
            f'levels of {channels} channels do not fit points of {groups} '
            'groups; the first must be divisible by the second'
        )
