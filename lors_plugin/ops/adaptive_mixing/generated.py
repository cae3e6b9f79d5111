"""Generating the matrices and mixing with them, in plain PyTorch.

Matrices that lie group by group, each kind for itself, are what the products
of mixing read and write without gaps: nothing is copied, and the gradient of
the generator is made from them in place.
"""

from typing import Optional

import torch
from torch import Tensor

from .fused import Factors, Shifts, mix, mix_backward


def forward(
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    factors: Factors,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Generate and mix.

    Args:
        x (Tensor): Shape (B, N, G, P, C), all tensors of one type.
        query (Tensor): Shape (B, N, D).
        weight (Tensor): Of the generator, shape (G (C C + Q P), D).
        bias (Tensor, optional): Of the generator, shape (G (C C + Q P), ).
        factors (tuple[Tensor | None]): See :func:`fused.forward`.
        eps (float): Added to the variances.

    Returns:
        tuple[Tensor]: The output (B, N, G, Q, C), and for backward the
        statistics (B, N, G, 4), the channel matrices (G, B N, C, C) and the
        spatial matrices (G, B N, Q, P), without the bias where there is a
        low-rank part to add as well.
    """
    groups, points, width = x.shape[2:]
    query = query.flatten(0, 1).expand(groups, -1, -1)
    shifts = _late(bias, factors, groups, width)
    channel, spatial = (
        query @ rows.mT
        if shift is None or late is not None
        else torch.baddbmm(shift.unsqueeze(1), query, rows.mT)
        for rows, shift, late in zip(
            kinds(weight, groups, width), kinds(bias, groups, width), shifts
        )
    )
    channel = channel.unflatten(-1, (width, width))
    spatial = spatial.unflatten(-1, (-1, points))
    out = mix(x, channel, spatial, factors, eps, shifts)
    return *out, channel, spatial


def backward(
    grad_out: Tensor,
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    needs_query: bool,
    needs_generator: bool,
    factors: Factors,
    stats: Tensor,
    channel: Tensor,
    spatial: Tensor,
    eps: float,
    total: Optional[Tensor] = None,
) -> tuple[
    Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Factors
]:
    """Gradients of the inputs of :func:`forward`.

    Those of the query and of the generator, large products, only where they
    are needed: adapters freeze a generator. With ``total``, the gradient of
    the weight is added to it.

    Returns:
        tuple: Of ``x``, ``query``, ``weight``, ``bias`` (None without one)
        and the factors.
    """
    groups, width = x.shape[2], x.shape[4]
    query_n = query.flatten(0, 1)
    grad_query = query_n.new_zeros(query_n.shape) if needs_query else None
    grad_weight = grad_bias = None
    if needs_generator:
        # Without queries, no group ever comes to its end.
        make = weight.new_empty if len(query_n) else weight.new_zeros
        grad_weight = make(weight.shape) if total is None else total
        grad_bias = make(len(weight)) if bias is not None else None
    rows = kinds(weight, groups, width)
    grad_rows = kinds(grad_weight, groups, width)
    grad_shifts = kinds(grad_bias, groups, width)
    # One group's gradients are used up before the next one's are made.
    buffers = [torch.empty_like(t[0]) for t in (channel, spatial)]

    def after_group(group: int) -> None:
        for kind, buffer in enumerate(buffers):
            grad = buffer.flatten(1)
            if grad_query is not None:
                grad_query.addmm_(grad, rows[kind][group])
            if total is not None:
                grad_rows[kind][group].addmm_(grad.T, query_n)
            elif grad_weight is not None:
                torch.mm(grad.T, query_n, out=grad_rows[kind][group])
            if grad_bias is not None:
                torch.sum(grad, 0, out=grad_shifts[kind][group])

    grad_x, grad_factors = mix_backward(
        grad_out,
        x,
        channel,
        spatial,
        factors,
        stats,
        eps,
        *(buffer.expand(groups, -1, -1, -1) for buffer in buffers),
        after_group,
        _late(bias, factors, groups, width),
    )
    if grad_query is not None:
        grad_query = grad_query.view(query.shape)
    return grad_x, grad_query, grad_weight, grad_bias, grad_factors


def _late(
    bias: Optional[Tensor], factors: Factors, groups: int, width: int
) -> Shifts:
    """Shifts of matrices that are put together later anyway, else None."""
    return tuple(
        None if left is None else shift
        for left, shift in zip(factors[::3], kinds(bias, groups, width))
    )


def kinds(
    weight: Optional[Tensor], groups: int, width: int
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Rows of the generator that make channel and spatial matrices.

    Args:
        weight (Tensor, optional): Shape (G (C C + Q P), ...).
        groups (int): ``G``.
        width (int): ``C``.

    Returns:
        tuple[Tensor]: Shapes (G, C C, ...) and (G, Q P, ...), views; None
        and None of None.
    """
    if weight is None:
        return None, None
    weight = weight.unflatten(0, (groups, -1))
    return weight[:, : width**2], weight[:, width**2 :]
