"""3D sampling from one table of all cells, in plain PyTorch.

All levels are laid side by side in one table, a row a cell and channels
last, so that the ``4 L`` cells a point reads are ``4 L`` rows of one sum with
weights: level and bilinear weights folded together, one pass, no result of a
single level in memory. That sum is ``embedding_bag``, which PyTorch has fast
kernels for on every device. Its transpose, the gradient of the table, is the
same function once the reads are sorted by row: no atomics, the same result
each time, and every row is written once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reads import by_point, find_reads

# Of a level, for each thread.
BLOCK_BYTES = 2**18


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


def planes(level: Tensor) -> Tensor:
    """A channels-last level with its channels in planes.

    What made a level in planes wants its gradient like that too.

    Args:
        level (Tensor): Shape (B, D, H, W), as :func:`unpack` gives it.

    Returns:
        Tensor: The same, contiguous.
    """
    out = level.new_empty(level.shape)
    if level.device.type != 'cpu':
        return out.copy_(level)
    # Of one thread, PyTorch turns a whole matrix block by block. Of several
    # it does not: blocks are what their caches hold.
    threads = torch.get_num_threads()
    size = level.shape[2] * level.shape[3]
    if threads > 1:
        cell = level.shape[1] * level.element_size()
        size = max(BLOCK_BYTES * threads // cell, 1)
    for image, channels in zip(level.flatten(2), out.flatten(2)):
        for target, source in zip(
            channels.split(size, 1), image.split(size, 1)
        ):
            target.copy_(source)
    return out


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
        _by_group(grad_out),
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


def _by_group(grad_out: Tensor) -> Tensor:
    """What flows back, in the order of the reads, shape (S, C)."""
    order = grad_out.permute(2, 0, 1, 3, 4)
    return order.reshape(-1, grad_out.shape[-1])


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
    grads = _join([_by_group(grad) for grad, _ in calls])
    if not grads.numel():
        return grads.new_zeros(rows, width)
    reads = [find_reads(where, sizes, strides) for _, where in calls]
    # A read is the number of its point plus a multiple of how many there are.
    where = _join([read.rows for read in reads], -1).flatten(1)
    weights = _join([read.weights() for read in reads], -1).view(-1)
    order, offsets = _by_row(where, rows, where.device.type == 'cuda')
    return F.embedding_bag(
        order.remainder(len(grads)),
        grads,
        offsets,
        mode='sum',
        per_sample_weights=weights.index_select(0, order),
    )


def _by_row(where: Tensor, rows: int, search: bool) -> tuple[Tensor, Tensor]:
    """Order of the reads by row, and where in it each row begins.

    Args:
        where (Tensor): Row of each read, shape (L, reads of a level). All
            rows of a level are before those of the next.
        rows (int): Number of rows.
        search (bool): Search the sorted rows rather than count. For GPUs,
            where counting is atomic and waits for the largest row.

    Returns:
        tuple[Tensor]: Shapes (L reads, ) and (rows, ).
    """
    if search:
        ordered, order = where.view(-1).sort(stable=True)
        each = torch.arange(rows, device=where.device, dtype=where.dtype)
        return order, torch.searchsorted(ordered, each)
    # A level at a time, since what is sorted should fit into the cache.
    order = torch.cat(
        [
            level.argsort(stable=True).add_(i * len(level))
            for i, level in enumerate(where)
        ]
    )
    number = torch.bincount(where.view(-1), minlength=rows)
    return order, number.cumsum(0) - number


def _join(parts: list, dim: int = 0) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
