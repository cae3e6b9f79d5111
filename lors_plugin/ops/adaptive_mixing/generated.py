"""Generating the matrices and mixing with them.

Matrices that lie group by group, each kind for itself, are what the products
of mixing read and write without gaps: nothing is copied, and the gradient of
the generator is made from them in place.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from ..memory import new_large
from ..packed_linear import PackedLinear, widen
from .fused import Factors, mix, mix_backward, of_group


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
        spatial matrices (G, B N, Q, P), with their low-rank parts.
    """
    groups, points, width = x.shape[2:]
    query = query.flatten(0, 1).expand(groups, -1, -1)
    channel, spatial = (
        query @ rows.mT
        if shift is None
        else torch.baddbmm(shift.unsqueeze(1), query, rows.mT)
        for rows, shift in zip(
            kinds(weight, groups, width), kinds(bias, groups, width)
        )
    )
    channel = channel.unflatten(-1, (width, width))
    spatial = spatial.unflatten(-1, (-1, points))
    matrices = of_group(channel, spatial)
    out = mix(x, spatial.shape[2], matrices, factors, eps, in_place=True)
    return *out, channel, spatial


def pack(
    weight: Tensor,
    bias: Optional[Tensor],
    groups: int,
    width: int,
    queries: int,
) -> list[tuple[PackedLinear, PackedLinear]]:
    """The generator as packed layers, for each group one of each kind.

    Args:
        weight (Tensor): See :func:`forward`, and what follows too.
        bias (Tensor, optional): See ``weight``.
        groups (int): ``G``.
        width (int): ``C``.
        queries (int): ``B N`` of all calls to come.
    """
    weights = kinds(weight, groups, width)
    biases = [
        [None] * groups if bias is None else bias
        for bias in kinds(bias, groups, width)
    ]
    return [
        tuple(
            PackedLinear(rows[group], shift[group], queries)
            for rows, shift in zip(weights, biases)
        )
        for group in range(groups)
    ]


def forward_packed(
    x: Tensor,
    query: Tensor,
    bias: Optional[Tensor],
    packed: list[tuple[PackedLinear, PackedLinear]],
    factors: Factors,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """As :func:`forward`, with what :func:`pack` made of the generator.

    Matrices of each group are tensors of their own. Unless they are to be
    kept, there are those of one group at a time, and none in the end.
    """
    points, width = x.shape[-2:]
    query = query.flatten(0, 1)
    if bias is not None:
        query = widen(query)
    channel, spatial = [], []

    def generate(group):
        to_channel, to_spatial = packed[group]
        pair = (
            to_channel(query).unflatten(-1, (width, width)),
            to_spatial(query).unflatten(-1, (-1, points)),
        )
        if keep:
            channel.append(pair[0])
            spatial.append(pair[1])
        return pair

    out_points = packed[0][1].out_features // points
    out = mix(x, out_points, generate, factors, eps, in_place=True)
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
    out: Tensor,
    stats: Tensor,
    channel: Sequence[Tensor],
    spatial: Sequence[Tensor],
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
        # Dense, whatever gaps the inputs have: the compiler relies on it.
        grad_weight = total
        if total is None:
            grad_weight = new_large(weight, weight.shape)
        grad_bias = weight.new_empty(len(weight)) if bias is not None else None
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
        *([buffer] * groups for buffer in buffers),
        after_group,
        complete=True,
        out=out,
    )
    if grad_query is not None:
        grad_query = grad_query.view(query.shape)
    return grad_x, grad_query, grad_weight, grad_bias, grad_factors


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
