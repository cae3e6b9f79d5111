"""Low-rank part of generated matrices, formed chunk by chunk."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor


class LowRankSide:
    """Low-rank part of one kind of matrix, with its gradients.

    ``n`` stands for the ``B N`` queries.

    Args:
        left (Tensor): Shape (G, K, rows, r).
        core (Tensor): Shape (B, N, G, K, r, r).
        right (Tensor): Shape (G, K, r, cols).
        size (int): Queries in a chunk.
    """

    def __init__(
        self, left: Tensor, core: Tensor, right: Tensor, size: int
    ) -> None:
        self.groups, self.num, _, self.rank = left.shape
        self.core_shape, self.core = core.shape, core.flatten(0, 1)
        self.right = right
        # A left factor for each query of a chunk: (G, size, rows, r K).
        left = left.permute(0, 2, 3, 1).flatten(2).unsqueeze(1)
        self.left = left.repeat(1, min(size, len(self.core)), 1, 1)
        # core_k right_k, row by row in turns: of each k, all queries are one
        # matrix with a stride, which products write without a copy.
        self.inner = core.new_empty(
            self.groups, len(self.core), self.rank * self.num, right.shape[-1]
        )
        for group, k, inner in self._each(self.inner):
            cores = self.core[:, group, k].flatten(0, 1)
            torch.mm(cores, right[group, k], out=inner)
        self.grad_left = self.grad_inner = None

    def _each(self, inner: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Give group, parameter group and its matrix (n r, cols), a view."""
        inner = inner.unflatten(2, (self.rank, self.num))
        for group in range(self.groups):
            for k in range(self.num):
                yield group, k, inner[group, :, :, k].flatten(0, 1)

    def add_to(
        self, base: Tensor, group: int, part: slice, out: Tensor
    ) -> Tensor:
        """Full matrices (m, rows, cols) of a chunk from generated ones.

        ``out`` may be ``base``.
        """
        factors = self.left[group, : base.shape[0]], self.inner[group, part]
        if out is base:
            return base.baddbmm_(*factors)
        return torch.baddbmm(base, *factors, out=out)

    def collect(self, grad: Tensor, group: int, part: slice) -> None:
        """Take the gradient (m, rows, cols) of a chunk's full matrices."""
        if self.grad_inner is None:
            self.grad_inner = torch.empty_like(self.inner)
            wide = torch.promote_types(grad.dtype, torch.float32)
            self.grad_left = torch.zeros_like(self.left, dtype=wide)
        left, inner = self.left[group, : len(grad)], self.inner[group, part]
        torch.bmm(left.mT, grad, out=self.grad_inner[group, part])
        total = self.grad_left[group, : len(grad)]
        if total.dtype == grad.dtype:
            total.baddbmm_(grad, inner.mT)
        else:
            total += grad.bmm(inner.mT)

    def grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``left``, ``core`` and ``right``."""
        core, right = self.core, self.right
        # Dense, whatever gaps the inputs have: the compiler relies on it.
        grad_core = core.new_zeros(core.shape)
        grad_right = right.new_zeros(right.shape)
        if self.grad_inner is None:  # no query
            rows = self.left.shape[2]
            shape = self.groups, self.num, rows, self.rank
            return (
                right.new_zeros(shape),
                grad_core.view(self.core_shape),
                grad_right,
            )
        for group, k, grad in self._each(self.grad_inner):
            product = grad @ right[group, k].T
            grad_core[:, group, k] = product.unflatten(0, (-1, self.rank))
            cores = core[:, group, k].flatten(0, 1)
            grad_right[group, k] = cores.T @ grad
        left = self.grad_left.sum(1).unflatten(2, (self.rank, self.num))
        left = left.permute(0, 3, 1, 2).to(core.dtype).contiguous()
        return left, grad_core.view(self.core_shape), grad_right


def make_side(
    left: Optional[Tensor],
    core: Optional[Tensor],
    right: Optional[Tensor],
    size: int,
) -> Optional[LowRankSide]:
    """A side, or None where there are no factors."""
    if left is None:
        return None
    return LowRankSide(left, core, right, size)
