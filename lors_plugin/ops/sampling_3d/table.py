"""3D sampling as one table lookup: the plain PyTorch implementation.

All levels are rows of one table, one row per cell with channels last. A point
reads ``4 L`` rows, the four corners on each level, so its feature is one
weighted sum of rows, with the weights of the levels and the bilinear weights
folded together: an ``embedding_bag``, which PyTorch has fast kernels for on
every device, and no tensor per level.

The coordinates of all ``S = G B N P`` points lie side by side, and small
dimensions (levels, axes, corners) come first: elementwise steps run over long
rows, many times as fast as over rows of two or four elements.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import is_plain, new_large


class SharedLevels(NamedTuple):
    """Feature levels as one table, for any number of samplings.

    Made by :func:`lors_plugin.ops.share_levels`. The table is an ordinary
    differentiable tensor: each sampling gives it a gradient, autograd adds
    them up, and the levels get the sum.

    Attributes:
        table (Tensor): Cells of all levels, level by level, image by image
            and row by row, shape (sum_l B H_l W_l, D), float32 or float64.
        batch (int): Number of images ``B``.
        spatial_shapes (tuple[tuple[int]]): Height and width of each level.
    """

    table: Tensor
    batch: int
    spatial_shapes: tuple

    def maps(self) -> list[Tensor]:
        """Return the levels as views of shape (B, D, H_l, W_l)."""
        cells = [self.batch * h * w for h, w in self.spatial_shapes]
        return [
            part.view(self.batch, *shape, -1).permute(0, 3, 1, 2)
            for part, shape in zip(
                self.table.split(cells), self.spatial_shapes
            )
        ]


def make_table(feats: Sequence[Tensor], dtype: torch.dtype) -> SharedLevels:
    """Lay all levels into one table.

    Args:
        feats (Sequence[Tensor]): Levels of shape (B, D, H_l, W_l).
        dtype (torch.dtype): Dtype of the table.
    """
    shapes = [feat.shape[2:] for feat in feats]
    if torch.jit.is_tracing():
        # There, sizes are tensors, which operators do not accept.
        shapes = [map(int, shape) for shape in shapes]
    if feats[0].device.type == 'cpu' and is_plain(feats):
        table = _Table.apply(dtype, *feats)
    else:
        rows = [f.to(dtype).permute(0, 2, 3, 1).flatten(0, 2) for f in feats]
        table = torch.cat(rows)
    return SharedLevels(table, len(feats[0]), tuple(map(tuple, shapes)))


class _Table(torch.autograd.Function):
    """Concatenate levels in channels-last layout on a CPU.

    As :func:`make_table` does elsewhere in two lines, in a third of the time:
    images are copied as transposed matrices, for which PyTorch has a fast
    path, into memory in large pages.
    """

    @staticmethod
    def forward(ctx, dtype, *feats):
        ctx.feats = [(f.shape, f.dtype, f.is_contiguous()) for f in feats]
        cells = [f.shape[0] * f.shape[2] * f.shape[3] for f in feats]
        table = new_large(feats[0], (sum(cells), feats[0].shape[1]), dtype)
        for rows, feat in zip(table.split(cells), feats):
            rows = rows.view(feat.permute(0, 2, 3, 1).shape)
            for out, image in zip(rows, feat):
                out.flatten(0, 1).copy_(image.flatten(1).T)
        return table

    @staticmethod
    def backward(ctx, grad):
        cells = [s[0] * s[2] * s[3] for s, _, _ in ctx.feats]
        grads = [None]
        for rows, need, (shape, dtype, planar) in zip(
            grad.split(cells), ctx.needs_input_grad[1:], ctx.feats
        ):
            if not need:
                grads.append(None)
                continue
            batch, channels, height, width = shape
            rows = rows.view(batch, height, width, channels)
            level = rows.permute(0, 3, 1, 2)
            if planar and not torch.is_grad_enabled():
                level = new_large(rows, shape, dtype)
                for out, image in zip(level, rows):
                    out.flatten(1).copy_(image.flatten(0, 1).T)
            grads.append(level.to(dtype))
        return tuple(grads)


class _Geometry(NamedTuple):
    """Constants of all calls with the same sizes, made once per device."""

    strides: Tensor  # (L, 1)
    pixels: Tensor  # (L, 2, 1), width and height in pixels of the image
    scales: Tensor  # (L, 1), log2 of the strides
    limits: Tensor  # (L, 2, 1), width and height in cells
    last: Tensor  # (L, 2, 1, 1), index of the last column and row
    widths: Tensor  # (L, 1, 1), table rows per row of a level
    starts: Tensor  # (L, 1, G, B, 1), first table row of each map and group


@functools.lru_cache(maxsize=32)
def _geometry(
    batch: int,
    groups: int,
    sizes: tuple,
    strides: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> _Geometry:
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
    return _Geometry(
        torch.tensor(strides, **number)[:, None],
        (limits * torch.tensor(strides)[:, None])[..., None].to(**number),
        torch.tensor([[math.log2(stride)] for stride in strides], **number),
        limits[..., None].to(**number),
        (limits - 1)[..., None, None].to(**index),
        (limits[:, :1, None] * groups).to(**index),
        starts[:, None, :, :, None].to(**index),
    )


class Corners(NamedTuple):
    """Table rows that points read, and their weights.

    Axes are x and y; neighbours are the cell before and the cell after the
    point. The corners of a level go by neighbour along y, then along x.
    Tables are seen as rows of C channels, ``G`` per cell.
    """

    rows: Tensor  # (L, 2, 2, S), by neighbour along y and x
    inside: Tensor  # (L, 2, 2, S), by axis and neighbour: 1 in the map, or 0
    linear: Tensor  # (L, 2, 2, S), by axis and neighbour: linear weights
    levels: Tensor  # (L, S), weights of the levels
    distance: Tensor  # (L, S), scale of the point minus that of the level
    strides: Tensor  # (L, 1)

    def weights(self) -> Tensor:
        """Return the weights of all corners, shape (L, 2, 2, S)."""
        x, y = self.linear.unbind(1)
        y = y * self.levels[:, None]
        return y[:, :, None] * x[:, None]


def find_corners(
    points: Tensor, sizes: Sequence[int], strides: Sequence[int]
) -> Corners:
    """Find the table rows that points read.

    Args:
        points (Tensor): Shape (B, N, G, P, 3).
        sizes (Sequence[int]): Height and width of each level in turn.
        strides (Sequence[int]): Pixels per cell of each level.
    """
    batch, _, groups = points.shape[:3]
    level = _geometry(
        batch,
        groups,
        tuple(sizes),
        tuple(strides),
        points.dtype,
        points.device,
    )
    # Shape (3, S): x, y and z.
    points = points.permute(4, 2, 0, 1, 3).contiguous().flatten(1)
    # In the steps of grid_sample: where a point lies on an edge between
    # cells, another rounding would choose other neighbours.
    cells = (points[:2] / level.pixels).mul_(2).sub_(1)
    cells.add_(1).mul_(level.limits / 2).sub_(0.5)
    # Far outside is outside; a huge value would overflow the index.
    cells = torch.minimum(cells, level.limits + 1).clamp_(min=-2)
    before = cells.floor()
    after = cells.sub_(before)
    linear = torch.stack([1 - after, after], dim=2)
    index = before.to(level.starts.dtype)
    index = torch.stack([index, index + 1], dim=2)
    # Rows must exist even where the weight is zero (or a point is NaN).
    valid = torch.minimum(index, level.last).clamp_(min=0)
    inside = (valid == index).to(points.dtype)
    x, y = valid.unbind(1)
    x = x * groups
    y = (y * level.widths).view(*y.shape[:2], groups, batch, -1)
    y.add_(level.starts)
    rows = y.view(x.shape)[:, :, None] + x[:, None]
    distance = points[2] - level.scales
    return Corners(
        rows,
        inside,
        linear.mul_(inside),
        (-(distance**2) / 2).softmax(0),
        distance,
        level.strides,
    )


def forward(
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Sample a table.

    Args:
        table (Tensor): Cells of all levels, shape (sum_l B H_l W_l, D).
        points (Tensor): Shape (B, N, G, P, 3), in the dtype of the table.
        sizes (Sequence[int]): Height and width of each level in turn.
        strides (Sequence[int]): Pixels per cell of each level.

    Returns:
        Tensor: Shape (B, N, G, P, C), in memory group by group, as the
        chunks of mixing read it.
    """
    batch, queries, groups, number, _ = points.shape
    width = table.shape[1] // groups
    shape = groups, batch, queries, number, width
    if not points.numel():
        return table.new_zeros(shape).permute(1, 2, 0, 3, 4)
    corners = find_corners(points, sizes, strides)
    out = F.embedding_bag(
        _by_point(corners.rows),
        table.view(-1, width),
        mode='sum',
        per_sample_weights=_by_point(corners.weights()),
    )
    return out.view(shape).permute(1, 2, 0, 3, 4)


def points_gradient(
    grad_out: Tensor,
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Compute the gradient of the points, shape (B, N, G, P, 3).

    Args:
        grad_out (Tensor): Shape (B, N, G, P, C).
        table, points, sizes, strides: As in :func:`forward`.
    """
    if not points.numel():
        return points.new_zeros(points.shape)
    corners = find_corners(points, sizes, strides)
    rows = _by_point(corners.rows)
    number, each = rows.shape
    bags = torch.arange(number, dtype=rows.dtype, device=table.device)
    width = grad_out.shape[-1]
    # Of each corner the product of its row with the gradient of the point.
    value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        by_group(grad_out),
        table.view(-1, width),
        rows.view(-1),
        bags * each,
        bags[:, None].expand(-1, each).reshape(-1),
        0,
    )
    value = value.view(number, each).T.contiguous().view(corners.rows.shape)
    x, y = corners.linear.unbind(1)
    along_x = (value * y[:, :, None]).sum(1)
    along_y = (value * x[:, None]).sum(2)
    slopes = torch.stack([along_x, along_y], dim=1).mul_(corners.inside)
    slopes = slopes[:, :, 1] - slopes[:, :, 0]
    slopes.mul_((corners.levels / corners.strides)[:, None])
    level = (along_y * y).sum(1)
    mean = (level * corners.levels).sum(0)
    scale = ((mean - level) * corners.levels * corners.distance).sum(0)
    grad = torch.cat([slopes.sum(0), scale[None]])
    batch, queries, groups, number, _ = points.shape
    grad = grad.view(3, groups, batch, queries, number)
    return grad.permute(2, 3, 1, 4, 0).contiguous()


def by_group(grad_out: Tensor) -> Tensor:
    """Gradient of the sampled features as rows of points, shape (S, C)."""
    order = grad_out.permute(2, 0, 1, 3, 4)
    return order.reshape(-1, grad_out.shape[-1])


def _by_point(corners: Tensor) -> Tensor:
    """Corners (L, 2, 2, S) in the order of the points, shape (S, 4 L)."""
    return corners.flatten(0, 2).T.contiguous()
