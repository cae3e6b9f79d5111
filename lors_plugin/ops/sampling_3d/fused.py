"""3D sampling from one table of all cells, in plain PyTorch.

All levels are laid side by side in one table, a row a cell and channels
last, so that the ``4 L`` cells a point reads are ``4 L`` rows of one sum with
weights: level and bilinear weights folded together, one pass, no result of a
single level in memory. That sum is ``embedding_bag``, which PyTorch has fast
kernels for on every device. Its transpose, the gradient of the table, is the
same function once the reads are sorted by row: no atomics, the same result
each time, and every row is written once.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(feats: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Lay all levels into one table.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, D, H_l, W_l).
        dtype (torch.dtype): Of the table.

    Returns:
        Tensor: Shape (sum_l B H_l W_l, D), row by row of the images of the
        first level, then of the second.
    """
    cells = [feat.shape[0] * feat.shape[2] * feat.shape[3] for feat in feats]
    table = feats[0].new_empty(sum(cells), feats[0].shape[1], dtype=dtype)
    for part, feat in zip(table.split(cells), feats):
        levels = feat.permute(0, 2, 3, 1)
        part.view(levels.shape).copy_(levels)
    return table


def unpack(table: Tensor, batch: int, sizes: Sequence[int]) -> list[Tensor]:
    """Levels of a table as views of shape (B, D, H_l, W_l).

    Args:
        table (Tensor): As :func:`pack` gives it.
        batch (int): Images ``B``.
        sizes (Sequence[int]): Height and width of each level in turn.
    """
    shapes = list(zip(sizes[::2], sizes[1::2]))
    parts = table.split([batch * h * w for h, w in shapes])
    return [
        part.view(batch, h, w, table.shape[1]).permute(0, 3, 1, 2)
        for part, (h, w) in zip(parts, shapes)
    ]


class _Levels(NamedTuple):
    """What all calls of one shape share; on the device, made once."""

    strides: Tensor  # (L,)
    pixels: Tensor  # (L, 2), width and height in pixels of the image
    scales: Tensor  # (L,), log2 of the strides
    limits: Tensor  # (L, 2), width and height
    last: Tensor  # (L, 2, 1), index of the last column and row
    widths: Tensor  # (L, 1), as indices
    starts: Tensor  # (B, 1, 1, 1, L, 1), first row of each map


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
    starts = rows.cumsum(0) - rows + torch.arange(batch)[:, None] * cells
    number = dict(dtype=dtype, device=device)
    index = dict(dtype=kind, device=device)
    return _Levels(
        torch.tensor(strides, **number),
        (limits * torch.tensor(strides)[:, None]).to(**number),
        torch.tensor([math.log2(stride) for stride in strides], **number),
        limits.to(**number),
        (limits - 1)[..., None].to(**index),
        limits[:, :1].to(**index),
        starts.view(batch, 1, 1, 1, -1, 1).to(**index),
    )


class _Reads(NamedTuple):
    """Where each point reads, and how much of it.

    Neighbours are the cell before and the cell after the point, first along
    x, then along y.
    """

    rows: Tensor  # (B, N, G, P, L, 2, 2), of y and x neighbours
    inside: Tensor  # (B, N, G, P, L, 2, 2), axis and neighbour; 1 in the map
    shares: Tensor  # (B, N, G, P, L, 2, 2), axis and neighbour
    levels: Tensor  # (B, N, G, P, L), weights of the levels
    distance: Tensor  # (B, N, G, P, L), scale of point minus that of level
    strides: Tensor  # (L,)

    def weights(self) -> Tensor:
        """Of all reads of a point, shape (S, 4 L)."""
        x, y = self.shares.unbind(-2)
        y = y * self.levels[..., None]
        return (y[..., None] * x[..., None, :]).view(self.flat)

    @property
    def flat(self) -> tuple:
        """tuple[int]: The shape (S, 4 L)."""
        points = math.prod(self.rows.shape[:4])
        return points, 4 * self.rows.shape[4]


def _reads(
    points: Tensor, sizes: Sequence[int], strides: Sequence[int]
) -> _Reads:
    batch, _, groups = points.shape[:3]
    level = _levels(
        batch,
        groups,
        tuple(sizes),
        tuple(strides),
        points.dtype,
        points.device,
    )
    # In the steps of grid_sample: where a point lies on an edge between
    # cells, another rounding would choose other neighbours.
    cells = (points[..., None, :2] / level.pixels).mul_(2).sub_(1)
    cells.add_(1).mul_(level.limits / 2).sub_(0.5)
    # Far outside is outside; a huge number would be no index.
    cells = torch.minimum(cells, level.limits + 1).clamp_(min=-2)
    before = cells.floor()
    after = cells - before
    shares = torch.stack([1 - after, after], dim=-1)
    index = before.to(level.starts.dtype)
    index = torch.stack([index, index + 1], dim=-1)
    # Rows must be rows even where the weight is zero (or a point is NaN).
    valid = torch.minimum(index, level.last).clamp_(min=0)
    inside = (valid == index).to(points.dtype)
    x, y = valid.unbind(-2)
    rows = y.mul_(level.widths).add_(level.starts)[..., None] + x[..., None, :]
    group = torch.arange(groups, dtype=rows.dtype, device=rows.device)
    rows.mul_(groups).add_(group.view(groups, 1, 1, 1, 1))
    distance = points[..., 2:] - level.scales
    return _Reads(
        rows,
        inside,
        shares.mul_(inside),
        (-(distance**2) / 2).softmax(-1),
        distance,
        level.strides,
    )


def sample(
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Sample a table.

    Args:
        table (Tensor): As :func:`pack` gives it.
        points (Tensor): Shape (B, N, G, P, 3).
        sizes (Sequence[int]): Height and width of each level in turn.
        strides (Sequence[int]): Pixels a cell of each level.

    Returns:
        Tensor: Shape (B, N, G, P, C).
    """
    shape = (*points.shape[:4], table.shape[1] // points.shape[2])
    if not points.numel():
        return table.new_zeros(shape)
    reads = _reads(points, sizes, strides)
    out = F.embedding_bag(
        reads.rows.view(reads.flat),
        table.view(-1, shape[-1]),
        mode='sum',
        per_sample_weights=reads.weights(),
    )
    return out.view(shape)


def points_gradient(
    grad_out: Tensor,
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Gradient of the points, shape (B, N, G, P, 3).

    Args:
        grad_out (Tensor): Shape (B, N, G, P, C).
        table, points, sizes, strides: As in :func:`sample`.
    """
    if not points.numel():
        return torch.zeros_like(points)
    reads = _reads(points, sizes, strides)
    number, each = reads.flat
    bags = torch.arange(number, dtype=reads.rows.dtype, device=table.device)
    width = grad_out.shape[-1]
    value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_out.reshape(number, width),
        table.view(-1, width),
        reads.rows.view(-1),
        bags * each,
        bags[:, None].expand(-1, each).reshape(-1),
        0,
    ).view(reads.rows.shape)
    x, y = reads.shares.unbind(-2)
    along_x = (value * y[..., None]).sum(-2)
    along_y = (value * x[..., None, :]).sum(-1)
    slopes = torch.stack([along_x, along_y], dim=-2).mul_(reads.inside)
    slopes = slopes[..., 1] - slopes[..., 0]
    slopes.mul_((reads.levels / reads.strides)[..., None])
    level = (along_y * y).sum(-1)
    mean = (level * reads.levels).sum(-1, keepdim=True)
    scale = ((mean - level) * reads.levels * reads.distance).sum(-1)
    return torch.cat([slopes.sum(-2), scale[..., None]], dim=-1)


def table_gradient(
    grad_outs: Sequence[Tensor],
    points: Sequence[Tensor],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Gradient of a table that was sampled several times.

    Args:
        grad_outs (Sequence[Tensor]): Of each call, shape (B, N, G, P, C).
            Calls may differ in everything but B and the product G C.
        points (Sequence[Tensor]): Of each call, shape (B, N, G, P, 3).
        sizes, strides: As in :func:`sample`.

    Returns:
        Tensor: As the table.
    """
    batch, _, groups, _, width = grad_outs[0].shape
    cells = batch * sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))
    channels = groups * width
    total = None
    # Rows of a group are parts of rows of the table: one width at a time.
    for groups in sorted({where.shape[2] for where in points}):
        calls = [
            (grad, where)
            for grad, where in zip(grad_outs, points)
            if where.shape[2] == groups
        ]
        part = _sum_by_row(calls, cells * groups, sizes, strides)
        part = part.view(cells, channels)
        total = part if total is None else total.add_(part)
    return total


def _sum_by_row(
    calls: list, rows: int, sizes: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """Sum what flows back into each of ``rows`` rows, shape (rows, C)."""
    width = calls[0][0].shape[-1]
    grads = _join([grad.reshape(-1, width) for grad, _ in calls])
    if not grads.numel():
        return grads.new_zeros(rows, width)
    reads = [_reads(where, sizes, strides) for _, where in calls]
    where = _join([read.rows.view(-1) for read in reads])
    weights = _join([read.weights().view(-1) for read in reads])
    each = reads[0].flat[1]
    order, offsets = _by_row(where, rows, where.device.type == 'cuda')
    return F.embedding_bag(
        order.div(each, rounding_mode='floor'),
        grads,
        offsets,
        mode='sum',
        per_sample_weights=weights[order],
    )


def _by_row(where: Tensor, rows: int, search: bool) -> tuple[Tensor, Tensor]:
    """Order of the reads by row, and where in it each row begins.

    Args:
        where (Tensor): Row of each read, shape (reads, ).
        rows (int): Number of rows.
        search (bool): Search the sorted rows rather than count. For GPUs,
            where counting is atomic and waits for the largest row.

    Returns:
        tuple[Tensor]: Shapes (reads, ) and (rows, ).
    """
    if search:
        ordered, order = where.sort(stable=True)
        each = torch.arange(rows, device=where.device, dtype=where.dtype)
        return order, torch.searchsorted(ordered, each)
    number = torch.bincount(where, minlength=rows)
    return where.argsort(stable=True), number.cumsum(0) - number


def _join(parts: list) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
