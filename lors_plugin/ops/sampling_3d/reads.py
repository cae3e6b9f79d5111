"""Which cells of the table points read, and how much of each.

Numbers of all points lie side by side, small dimensions (levels, axes,
neighbours) come first: every step is one pass over long rows, where the same
steps with two or four numbers in a row cost many times as much.
Points go by group, image, query and number: ``S = G B N P`` of them.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Levels(NamedTuple):
    """What all calls of one shape share; on the device, made once."""

    strides: Tensor  # (L, 1)
    pixels: Tensor  # (L, 2, 1), width and height in pixels of the image
    scales: Tensor  # (L, 1), log2 of the strides
    limits: Tensor  # (L, 2, 1), width and height
    last: Tensor  # (L, 2, 1, 1), index of the last column and row
    widths: Tensor  # (L, 1, 1), rows of the table a row of a map
    starts: Tensor  # (L, 1, G, B, 1), first row of each map and group


@functools.lru_cache(maxsize=32)
def _levels(
    batch: int,
    groups: int,
    sizes: tuple,
    strides: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> _Levels:
    limits = torch.tensor(list(zip(sizes[1::2], sizes[::2])))
    cells = limits.prod(1)
    rows = batch * cells
    fits = int(rows.sum()) * groups < 2**31
    kind = torch.int32 if fits else torch.int64
    # (L, G, B): levels one after another, images in them, groups in a cell.
    starts = (rows.cumsum(0) - rows)[:, None, None]
    starts = starts + torch.arange(batch) * cells[:, None, None]
    starts = starts * groups + torch.arange(groups)[:, None]
    number = dict(dtype=dtype, device=device)
    index = dict(dtype=kind, device=device)
    return _Levels(
        torch.tensor(strides, **number)[:, None],
        (limits * torch.tensor(strides)[:, None])[..., None].to(**number),
        torch.tensor([[math.log2(stride)] for stride in strides], **number),
        limits[..., None].to(**number),
        (limits - 1)[..., None, None].to(**index),
        (limits[:, :1, None] * groups).to(**index),
        starts[:, None, :, :, None].to(**index),
    )


class Reads(NamedTuple):
    """Where each point reads, and how much of it.

    Axes are x and y, neighbours the cell before and the cell after the
    point. Reads of a point go by level, neighbour along y, neighbour along x.
    """

    rows: Tensor  # (L, 2, 2, S), of y and x neighbours
    inside: Tensor  # (L, 2, 2, S), axis and neighbour; 1 in the map
    shares: Tensor  # (L, 2, 2, S), axis and neighbour
    levels: Tensor  # (L, S), weights of the levels
    distance: Tensor  # (L, S), scale of point minus that of level
    strides: Tensor  # (L, 1)

    def weights(self) -> Tensor:
        """Of all reads, shape (L, 2, 2, S)."""
        x, y = self.shares.unbind(1)
        y = y * self.levels[:, None]
        return y[:, :, None] * x[:, None]


def by_point(reads: Tensor) -> Tensor:
    """Reads (L, 2, 2, S) in the order of the points, shape (S, 4 L)."""
    return reads.flatten(0, 2).T.contiguous()


def find_reads(
    points: Tensor, sizes: Sequence[int], strides: Sequence[int]
) -> Reads:
    """Find what points read.

    Args:
        points (Tensor): Shape (B, N, G, P, 3).
        sizes (Sequence[int]): Height and width of each level in turn.
        strides (Sequence[int]): Pixels a cell of each level.
    """
    batch, _, groups = points.shape[:3]
    level = _levels(
        batch,
        groups,
        tuple(sizes),
        tuple(strides),
        points.dtype,
        points.device,
    )
    # x, y and z, a row of S numbers each.
    points = points.permute(4, 2, 0, 1, 3).contiguous().flatten(1)
    # In the steps of grid_sample: where a point lies on an edge between
    # cells, another rounding would choose other neighbours.
    cells = (points[:2] / level.pixels).mul_(2).sub_(1)
    cells.add_(1).mul_(level.limits / 2).sub_(0.5)
    # Far outside is outside; a huge number would be no index.
    cells = torch.minimum(cells, level.limits + 1).clamp_(min=-2)
    before = cells.floor()
    after = cells.sub_(before)
    shares = torch.stack([1 - after, after], dim=2)
    index = before.to(level.starts.dtype)
    index = torch.stack([index, index + 1], dim=2)
    # Rows must be rows even where the weight is zero (or a point is NaN).
    valid = torch.minimum(index, level.last).clamp_(min=0)
    inside = (valid == index).to(points.dtype)
    x, y = valid.unbind(1)
    x = x * groups
    y = (y * level.widths).view(*y.shape[:2], groups, batch, -1)
    y.add_(level.starts)
    rows = y.view(x.shape)[:, :, None] + x[:, None]
    distance = points[2] - level.scales
    return Reads(
        rows,
        inside,
        shares.mul_(inside),
        (-(distance**2) / 2).softmax(0),
        distance,
        level.strides,
    )
