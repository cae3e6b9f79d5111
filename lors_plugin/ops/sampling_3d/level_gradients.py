"""Gradients of the levels, in plain PyTorch.

The transpose of a sum over rows of a table is the same function once the
reads are sorted by row: no atomics, the same result each time, and every row
is written once. Whoever made a level in planes wants its gradient like that
too; on a CPU, rows are turned block by block while they are in the cache, and
the gradient of the table as a whole is never in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import new_large
from .fused import by_group
from .reads import find_reads

# Of a gradient, turned at once.
BLOCK_BYTES = 2**20


def levels_gradient(
    grad_outs: Sequence[Tensor],
    points: Sequence[Tensor],
    sizes: Sequence[int],
    strides: Sequence[int],
    planar: Sequence[bool],
) -> list[Tensor]:
    """Gradients of levels that were sampled several times.

    Args:
        grad_outs (Sequence[Tensor]): Of each call, shape (B, N, G, P, C).
            Calls may differ in everything but B and the product G C.
        points (Sequence[Tensor]): Of each call, shape (B, N, G, P, 3).
        sizes, strides: As in :func:`fused.sample`.
        planar (Sequence[bool]): Whether a gradient is wanted contiguous
            rather than channels last.

    Returns:
        list[Tensor]: Shapes (B, D, H_l, W_l).
    """
    batch, _, groups, _, width = grad_outs[0].shape
    calls = [pair for pair in zip(grad_outs, points) if pair[0].numel()]
    # Rows of a group are parts of rows of the table: one width at a time.
    kinds = [
        _reads(number, calls, sizes, strides)
        for number in sorted({where.shape[2] for _, where in calls})
    ]
    grads, first = [], 0
    for i, (height, columns) in enumerate(zip(sizes[::2], sizes[1::2])):
        cells = batch * height * columns
        shape = batch, height, columns, groups * width
        if not calls:
            rows = grad_outs[0].new_zeros(shape).permute(0, 3, 1, 2)
            grads.append(rows.contiguous() if planar[i] else rows)
            continue
        level = _Level(kinds, i, first, cells)
        first += cells
        if planar[i]:
            grads.append(_planes(level, *shape))
        else:
            rows = level.rows(0, cells).view(shape)
            grads.append(rows.permute(0, 3, 1, 2))
    return grads


class _Reads(NamedTuple):
    """What calls of one number of groups read."""

    groups: int
    grads: Tensor  # (S, C), what flows back into the points
    where: Tensor  # (L, R), row of each read
    weights: Tensor  # (L, R)


def _reads(
    groups: int,
    calls: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> _Reads:
    calls = [call for call in calls if call[1].shape[2] == groups]
    grads = _join([by_group(grad) for grad, _ in calls])
    reads = [find_reads(where, sizes, strides) for _, where in calls]
    # A read is the number of its point plus a multiple of how many there are.
    where = _join([read.rows for read in reads], -1).flatten(1)
    weights = _join([read.weights() for read in reads], -1).flatten(1)
    return _Reads(groups, grads, where, weights)


class _Level:
    """The gradient of a level, a row a cell.

    Args:
        kinds (list[_Reads]): Of each number of groups.
        level (int): Which one.
        first (int): Cells of the levels before it.
        cells (int): Its own.
    """

    def __init__(
        self, kinds: list[_Reads], level: int, first: int, cells: int
    ) -> None:
        self.like = kinds[0].grads
        self._sums = [
            (
                kind.groups,
                _SumByRow(
                    kind.grads,
                    kind.where[level] - first * kind.groups,
                    kind.weights[level],
                    cells * kind.groups,
                ),
            )
            for kind in kinds
        ]

    def rows(self, start: int, stop: int) -> Tensor:
        """Of cells ``start`` to ``stop``, shape (stop - start, D)."""
        total = None
        for groups, sums in self._sums:
            part = sums.rows(start * groups, stop * groups)
            part = part.view(stop - start, -1)
            total = part if total is None else total.add_(part)
        return total


class _SumByRow:
    """What flows back into each row, summed.

    Args:
        grads (Tensor): Of points, shape (S, C).
        where (Tensor): Row of each read, shape (R, ); read ``i`` is one of
            point ``i % S``.
        weights (Tensor): Of the reads, shape (R, ).
        number (int): Of rows.
    """

    def __init__(
        self, grads: Tensor, where: Tensor, weights: Tensor, number: int
    ) -> None:
        self._grads, self._number = grads, number
        order, self._begins = by_row(where, number, where.is_cuda)
        self._points = order.remainder(len(grads))
        self._weights = weights.index_select(0, order)

    def rows(self, start: int, stop: int) -> Tensor:
        """Shape (stop - start, C)."""
        points, weights, begins = self._points, self._weights, self._begins
        if (start, stop) != (0, self._number):
            # Numbers that a GPU would be waited for.
            end = len(points)
            if stop < self._number:
                end = int(begins[stop])
            begin = int(begins[start])
            points, weights = points[begin:end], weights[begin:end]
            begins = begins[start:stop] - begin
        return F.embedding_bag(
            points,
            self._grads,
            begins,
            mode='sum',
            per_sample_weights=weights,
        )


def _planes(
    level: _Level, batch: int, height: int, columns: int, channels: int
) -> Tensor:
    """A level's gradient, contiguous (B, D, H, W)."""
    cells = height * columns
    if level.like.device.type != 'cpu':
        rows = level.rows(0, batch * cells).view(batch, cells, channels)
        return rows.mT.contiguous().view(batch, channels, height, columns)
    grad = new_large(level.like, (batch, channels, cells))
    # In one thread, PyTorch turns a whole image block by block itself.
    size = max(cells, 1)
    if torch.get_num_threads() > 1:
        size = max(BLOCK_BYTES // (channels * grad.element_size()), 1)
    for image, planes in enumerate(grad):
        start = image * cells
        for part in planes.split(size, 1):
            stop = start + part.shape[1]
            part.copy_(level.rows(start, stop).T)
            start = stop
    return grad.view(batch, channels, height, columns)


def by_row(where: Tensor, rows: int, search: bool) -> tuple[Tensor, Tensor]:
    """Order of the reads by row, and where in it each row begins.

    Args:
        where (Tensor): Row of each read, shape (R, ).
        rows (int): Number of rows.
        search (bool): Search the sorted rows rather than count. For GPUs,
            where counting is atomic and waits for the largest row.

    Returns:
        tuple[Tensor]: Shapes (R, ) and (rows, ).
    """
    if search:
        ordered, order = where.sort(stable=True)
        each = torch.arange(rows, device=where.device, dtype=where.dtype)
        return order, torch.searchsorted(ordered, each)
    number = torch.bincount(where, minlength=rows)
    return where.argsort(stable=True), number.cumsum(0) - number


def _join(parts: list, dim: int = 0) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
