"""Gradient of the table of all levels, in plain PyTorch.

The transpose of a weighted sum of rows is a weighted sum of rows once the
corners are sorted by row: no atomics, the same result each time, and every
row of the gradient is written once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backend import new_large
from .table import by_group, find_corners

# Rows of the gradient that are computed at once on a CPU stay in its cache.
BLOCK_BYTES = 2**20

Terms = list[tuple[Tensor, Tensor]]


class TableGradient(Tensor):
    """Gradient of a table, as the list of the samplings that it comes from.

    The gradient of the table is as large as all levels, whatever the number
    of points. Stages that sample the same levels would each write one and
    autograd would add them up, which costs more than all of the sampling.
    Adding two of these joins their lists; any other operation computes the
    elements first, in one pass over the whole list.

    Args:
        terms (list[tuple[Tensor]]): Of each sampling the gradient of its
            result, shape (B, N, G, P, C), and its points, (B, N, G, P, 3).
            N, G and P may differ.
        shape (Sequence[int]): Shape of the table, (sum_l B H_l W_l, D).
        sizes (Sequence[int]): Height and width of each level in turn.
        strides (Sequence[int]): Pixels per cell of each level.
    """

    @staticmethod
    def __new__(cls, terms, shape, sizes, strides):
        grad_out = terms[0][0]
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=grad_out.dtype, device=grad_out.device
        )

    def __init__(
        self,
        terms: Terms,
        shape: Sequence[int],
        sizes: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        self.terms = terms
        self.levels = tuple(sizes), tuple(strides)
        self._dense = None

    def dense(self) -> Tensor:
        """Compute the elements, once."""
        if self._dense is None:
            self._dense = table_gradient(self.terms, self.shape, *self.levels)
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if (
            func is torch.ops.aten.add.Tensor
            and not kwargs
            and all(isinstance(a, cls) and a._dense is None for a in args)
            and args[0].levels == args[1].levels
        ):
            terms = args[0].terms + args[1].terms
            return cls(terms, args[0].shape, *args[0].levels)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def table_gradient(
    terms: Terms,
    shape: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Compute the gradient of a table; arguments of :class:`TableGradient`.

    Returns:
        Tensor: Of that shape, contiguous.
    """
    total = None
    like = terms[0][0]
    terms = [term for term in terms if term[0].numel()]
    # With more groups, rows are narrower.
    for groups in sorted({points.shape[2] for _, points in terms}):
        grads, corners = zip(
            *(
                (by_group(grad_out), find_corners(points, sizes, strides))
                for grad_out, points in terms
                if points.shape[2] == groups
            )
        )
        grad = _add_up(
            torch.cat(grads),
            torch.cat([c.rows.flatten(0, 2) for c in corners], 1).flatten(),
            torch.cat([c.weights().flatten(0, 2) for c in corners], 1),
            shape[0] * groups,
        ).view(shape)
        total = grad if total is None else total.add_(grad)
    return like.new_zeros(shape) if total is None else total


def _add_up(
    grads: Tensor, rows: Tensor, weights: Tensor, number: int
) -> Tensor:
    """Add weighted gradients of points up in the rows that the points read.

    Args:
        grads (Tensor): Gradients of points, shape (S, C).
        rows (Tensor): Table row of each corner, shape (R, ); corner ``i`` is
            one of point ``i % S``.
        weights (Tensor): Weights of the corners, R elements.
        number (int): Number of rows in the table.

    Returns:
        Tensor: Shape (number, C).
    """
    order, begins = sort_by_row(rows, number, rows.is_cuda)
    points = order.remainder(len(grads))
    weights = weights.flatten().index_select(0, order)

    def bags(points, weights, begins):
        return F.embedding_bag(
            points, grads, begins, mode='sum', per_sample_weights=weights
        )

    if grads.device.type != 'cpu':
        return bags(points, weights, begins)
    out = new_large(grads, (number, grads.shape[1]))
    size = max(BLOCK_BYTES // (out.stride(0) * out.element_size()), 1)
    ends = [*begins[size::size].tolist(), len(points)]
    begin = 0
    for part, first, end in zip(out.split(size), begins.split(size), ends):
        block = slice(begin, end)
        part.copy_(bags(points[block], weights[block], first - begin))
        begin = end
    return out


def sort_by_row(
    rows: Tensor, number: int, search: bool
) -> tuple[Tensor, Tensor]:
    """Sort corners by their table row.

    Args:
        rows (Tensor): Row of each corner, shape (R, ).
        number (int): Number of rows in the table.
        search (bool): Search the sorted rows rather than count them. For
            GPUs, where counting is atomic and waits for the largest row.

    Returns:
        tuple[Tensor]: The order of the corners, shape (R, ), and where in it
        each row begins, shape (number, ).
    """
    if search:
        ordered, order = rows.sort(stable=True)
        each = torch.arange(number, device=rows.device, dtype=rows.dtype)
        return order, torch.searchsorted(ordered, each)
    counts = torch.bincount(rows, minlength=number)
    return rows.argsort(stable=True), counts.cumsum(0) - counts
