"""Adaptive 3D sampling: the public functions and their checks."""

from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

from ..backend import select_backend
from . import op
from .reference import sampling_3d_reference

__all__ = ['PackedLevels', 'sampling_3d', 'share_levels']

MAX_WIDTH = 4096  # channels a group that fit into a tile of the kernels


class PackedLevels(NamedTuple):
    """Levels in the layout of the kernels.

    Attributes:
        table (Tensor): Cells of all levels, shape (sum_l B H_l W_l, D),
            without gradient.
        feats (tuple[Tensor]): The levels.
        sizes (tuple[int]): Height and width of each level in turn.
        strides (tuple[int]): Pixels a cell of each level.
        tokens (tuple[Tensor]): Where the gradient of the one call goes that
            these levels are for; empty where the levels need none, for any
            number of calls.
    """

    table: Tensor
    feats: tuple
    sizes: tuple
    strides: tuple
    tokens: tuple = ()


Levels = Union[Sequence[Tensor], PackedLevels]


def sampling_3d(
    feats: Levels,
    points: Tensor,
    strides: Sequence[int],
    backend: str = 'auto',
) -> Tensor:
    """Sample a feature pyramid at points with a scale of their own.

    AdaMixer, section 3.1. A point ``(x, y, z)`` reads every level ``l``
    bilinearly at ``(x, y)`` (zero outside the map) and weighs the levels
    with ``softmax_l(-(z - log2 stride_l)^2 / 2)``. Group ``g`` owns the
    ``g``-th of ``G`` contiguous slices of the channels and its own points.

    Runs in float32, also under autocast and for half-precision levels
    (coordinates of large images need the digits), and in float64 if any
    input is float64. The gradient of a level is contiguous where the level
    is, else channels last. It is not computed where no level needs it.
    Levels that are sampled several times should go through
    :func:`share_levels` first; one pass without gradients over other levels
    samples them level by level on a CPU.

    Args:
        feats (Sequence[Tensor] | PackedLevels): Levels, each of shape
            (B, D, H_l, W_l), of any strides in memory.
        points (Tensor): Shape (B, N, G, P, 3): x and y in pixels of the
            input image, z as log2 of pixels.
        strides (Sequence[int]): Pixels a cell of each level.
        backend (str): 'auto', 'torch', 'triton' or 'reference'. Defaults to
            'auto'.

    Returns:
        Tensor: Shape (B, N, G, P, C), with C = D / G.

    Raises:
        ValueError: If shapes do not fit together, or levels from
            :func:`share_levels` were made for other strides or types.
    """
    if isinstance(feats, PackedLevels):
        _check_packed(feats, points, strides)
        channels = feats.table.shape[1]
        points = points.to(feats.table.dtype)
    else:
        _check(feats, points, strides)
        channels = feats[0].shape[1]
        points = points.to(_dtype(points, *feats))
    refusal = _refusal(channels // points.shape[2])
    backend = select_backend(backend, points, refusal)
    if backend == 'reference' or (backend == 'torch' and _once(feats, points)):
        levels = feats.feats if isinstance(feats, PackedLevels) else feats
        return sampling_3d_reference(levels, points, strides)
    if not isinstance(feats, PackedLevels):
        calls = [points.shape[1:4]]
        (feats,) = _pack(feats, strides, calls, points.dtype)
    return op.sample(
        feats.table,
        points,
        list(feats.tokens),
        list(feats.sizes),
        list(strides),
        backend,
    )


def share_levels(
    feats: Sequence[Tensor],
    strides: Sequence[int],
    calls: Sequence[tuple],
    backend: str = 'auto',
    dtype: torch.dtype = torch.float32,
) -> list:
    """Prepare levels for several calls of :func:`sampling_3d`.

    Levels are converted to the layout of the kernels once instead of in each
    call, and get one gradient for all calls.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, D, H_l, W_l).
        strides (Sequence[int]): Pixels a cell of each level.
        calls (Sequence[tuple[int]]): N, G and P of each call to come.
        backend (str): As in :func:`sampling_3d`. Defaults to 'auto'.
        dtype (torch.dtype): Of the points to come. Defaults to float32.

    Returns:
        list: For each call what to give as ``feats``, for that call alone.
    """
    _check_levels(feats, strides)
    probe = feats[0].new_empty(0, dtype=dtype)
    if select_backend(backend, probe) == 'reference':
        return [feats] * len(calls)
    return _pack(feats, strides, calls, _dtype(probe, *feats))


def _once(feats: Levels, points: Tensor) -> bool:
    """Whether packing the levels would never be paid back.

    On a CPU it costs more than all that one forward pass can save.
    """
    if isinstance(feats, PackedLevels) or points.device.type != 'cpu':
        return False
    needs_grad = any(t.requires_grad for t in (points, *feats))
    return not (needs_grad and torch.is_grad_enabled())


def _refusal(width: int) -> str:
    """Why the kernels refuse so many channels a group, '' if they do not."""
    if width > MAX_WIDTH:
        return (
            f'the kernels of sampling take up to {MAX_WIDTH} channels a '
            f'group, got {width}'
        )
    return ''


def _pack(
    feats: Sequence[Tensor],
    strides: Sequence[int],
    calls: Sequence[tuple],
    dtype: torch.dtype,
) -> list[PackedLevels]:
    """Levels for each call, with tokens where a level needs a gradient."""
    table = op.pack([feat.detach() for feat in feats], dtype)
    sizes = tuple(size for feat in feats for size in feat.shape[2:])
    packed = PackedLevels(table, tuple(feats), sizes, tuple(strides))
    needs_grad = any(feat.requires_grad for feat in feats)
    if not (torch.is_grad_enabled() and needs_grad):
        return [packed] * len(calls)
    shapes = [size for call in calls for size in (len(feats[0]), *call)]
    tokens = op.make_tokens(list(feats), dtype, shapes, list(strides))
    return [
        PackedLevels(*packed[:-1], tuple(tokens[i : i + op.TOKENS]))
        for i in range(0, len(tokens), op.TOKENS)
    ]


def _dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _check(feats, points, strides):
    _check_levels(feats, strides)
    _check_points(points, len(feats[0]), feats[0].shape[1])


def _check_levels(feats, strides):
    _check_number(len(feats), strides)
    for level, feat in enumerate(feats):
        if feat.dim() != 4:
            raise ValueError(
                f'feats[{level}] must have shape (B, D, H, W), '
                f'got {tuple(feat.shape)}'
            )
        if feat.shape[:2] != feats[0].shape[:2]:
            raise ValueError(
                f'feats[{level}] has {feat.shape[0]} images of '
                f'{feat.shape[1]} channels, feats[0] {feats[0].shape[0]} of '
                f'{feats[0].shape[1]}; all levels need the same numbers'
            )


def _check_packed(packed, points, strides):
    _check_number(len(packed.sizes) // 2, strides)
    if tuple(strides) != packed.strides:
        raise ValueError(
            f'these levels were shared for strides {packed.strides}, '
            f'got {tuple(strides)}'
        )
    _check_points(points, len(packed.feats[0]), packed.table.shape[1])
    if points.dtype == torch.float64 != packed.table.dtype:
        raise ValueError(
            f'these levels were shared for points of {packed.table.dtype}, '
            'got torch.float64; use share_levels(..., dtype=torch.float64)'
        )
    if packed.tokens and packed.tokens[0].shape[:4] != points.shape[:4]:
        raise ValueError(
            'these levels were shared for points of shape '
            f'{(*packed.tokens[0].shape[:4], 3)}, got {tuple(points.shape)}'
        )


def _check_number(num_levels, strides):
    if num_levels != len(strides) or not num_levels:
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
    if channels % groups:
        raise ValueError(
            f'levels of {channels} channels do not fit points of {groups} '
            'groups; the first must be divisible by the second'
        )
