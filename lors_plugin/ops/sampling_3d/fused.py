"""3D sampling from one table of all cells, in plain PyTorch.

All levels are laid side by side in one table, a row a cell and channels
last, so that the ``4 L`` cells a point reads are ``4 L`` rows of one sum with
weights: level and bilinear weights folded together, one pass, no result of a
single level in memory. That sum is ``embedding_bag``, which PyTorch has fast
kernels for on every device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import new_large
from .reads import by_point, find_reads


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
    table = new_large(feats[0], (sum(cells), feats[0].shape[1]), dtype)
    for part, feat in zip(table.split(cells), feats):
        levels = feat.permute(0, 2, 3, 1)
        part.view(levels.shape).copy_(levels)
    return table


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
        Tensor: Shape (B, N, G, P, C), in memory one group after another, as
        the chunks of mixing read it.
    """
    batch, queries, groups, number, _ = points.shape
    width = table.shape[1] // groups
    shape = groups, batch, queries, number, width
    if not points.numel():
        return table.new_zeros(shape).permute(1, 2, 0, 3, 4)
    reads = find_reads(points, sizes, strides)
    out = F.embedding_bag(
        by_point(reads.rows),
        table.view(-1, width),
        mode='sum',
        per_sample_weights=by_point(reads.weights()),
    )
    return out.view(shape).permute(1, 2, 0, 3, 4)


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
    reads = find_reads(points, sizes, strides)
    rows = by_point(reads.rows)
    number, each = rows.shape
    bags = torch.arange(number, dtype=rows.dtype, device=table.device)
    width = grad_out.shape[-1]
    value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        by_group(grad_out),
        table.view(-1, width),
        rows.view(-1),
        bags * each,
        bags[:, None].expand(-1, each).reshape(-1),
        0,
    )
    value = value.view(number, each).T.contiguous().view(reads.rows.shape)
    x, y = reads.shares.unbind(1)
    along_x = (value * y[:, :, None]).sum(1)
    along_y = (value * x[:, None]).sum(2)
    slopes = torch.stack([along_x, along_y], dim=1).mul_(reads.inside)
    slopes = slopes[:, :, 1] - slopes[:, :, 0]
    slopes.mul_((reads.levels / reads.strides)[:, None])
    level = (along_y * y).sum(1)
    mean = (level * reads.levels).sum(0)
    scale = ((mean - level) * reads.levels * reads.distance).sum(0)
    grad = torch.cat([slopes.sum(0), scale[None]])
    batch, queries, groups, number, _ = points.shape
    grad = grad.view(3, groups, batch, queries, number)
    return grad.permute(2, 3, 1, 4, 0).contiguous()


def by_group(grad_out: Tensor) -> Tensor:
    """What flows back, in the order of the reads, shape (S, C)."""
    order = grad_out.permute(2, 0, 1, 3, 4)
    return order.reshape(-1, grad_out.shape[-1])
