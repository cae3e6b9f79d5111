"""Full weights of a stack as one shared weight and low-rank parts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """What stands for the weights of a stack.

    Attributes:
        shared (Tensor): Shape (out, in).
        down (list[Tensor]): A layer's ``A``, shape (rank, in).
        up (list[Tensor]): A layer's ``B``, shape (out, rank).
        error (float): Frobenius norm of what is lost, relative to the
            weights.
    """

    shared: Tensor
    down: list
    up: list
    error: float


@torch.no_grad()
def factorize(weights: Sequence[Tensor], ranks: Sequence[int]) -> Factors:
    """Bring the weights of a stack into the form ``W + B_l A_l``.

    ``W`` is their mean and ``B_l A_l`` the best approximation of that rank
    to what remains (truncated SVD). Computed in float64.

    Args:
        weights (Sequence[Tensor]): Of each layer, shape (out, in).
        ranks (Sequence[int]): Of each layer; 0 leaves it the mean alone.

    Returns:
        Factors: In the dtype of the weights.
    """
    dtype = weights[0].dtype
    full = torch.stack([weight.double() for weight in weights])
    shared = full.mean(0)
    downs, ups, lost = [], [], 0.0
    for residual, rank in zip(full - shared, ranks):
        down, up = _truncated(residual, rank)
        lost += (residual - up @ down).square().sum().item()
        downs.append(down.to(dtype))
        ups.append(up.to(dtype))
    error = (lost / max(full.square().sum().item(), 1e-300)) ** 0.5
    return Factors(shared.to(dtype), downs, ups, error)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rank, in) and (out, rank), of equal size."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = values[:rank].sqrt()
    return scale[:, None] * right[:rank], left[:, :rank] * scale
