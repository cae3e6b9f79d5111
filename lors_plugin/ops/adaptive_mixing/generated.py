"""Generating the matrices and mixing with them.

Matrices that lie group by group, each kind for itself, are what the products
of mixing read and write without gaps: nothing is copied, and the gradient of
the generator is made from them in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import new_large
from ..packed_linear import PackedLinear, widen
from .fused import Factors, mix, mix_backward, of_group

# Of one group: from queries to channel matrices, and to spatial ones.
Layers = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


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
) -> list[Layers]:
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


def as_layers(
    weight: Tensor, bias: Optional[Tensor], groups: int, width: int
) -> list[Layers]:
    """The same as :func:`pack`, of the generator as it is."""
    layers = [
        [
            partial(F.linear, weight=rows[group], bias=shift)
            for group, shift in enumerate(
                [None] * groups if shifts is None else shifts
            )
        ]
        for rows, shifts in zip(
            kinds(weight, groups, width), kinds(bias, groups, width)
        )
    ]
    return list(zip(*layers))


def generate(
    query: Tensor, layers: Layers, width: int, points: int
) -> tuple[Tensor, Tensor]:
    """Matrices (n, C, C) and (n, Q, P) of a group from queries (n, ...)."""
    to_channel, to_spatial = layers
    return (
        to_channel(query).unflatten(-1, (width, width)),
        to_spatial(query).unflatten(-1, (-1, points)),
    )


def forward_packed(
    x: Tensor,
    query: Tensor,
    bias: Optional[Tensor],
    packed: list[Layers],
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

    def matrices(group):
        pair = generate(query, packed[group], width, points)
        if keep:
            channel.append(pair[0])
            spatial.append(pair[1])
        return pair

    out_points = packed[0][1].out_features // points
    out = mix(x, out_points, matrices, factors, eps, in_place=True)
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
    out: Optional[Tensor],
    stats: Tensor,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    eps: float,
    total: Optional[Tensor] = None,
    complete: bool = True,
) -> tuple[
    Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Factors
]:
    """Gradients of the inputs of :func:`forward`.

    Those of the query and of the generator, large products, only where they
    are needed: adapters freeze a generator. With ``total``, the gradient of
    the weight is added to it. ``matrices`` gives those of a group, which are
    ``complete`` if they have their low-rank parts.

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
    shapes = (width, width), (grad_out.shape[3], x.shape[3])
    buffers = [x.new_empty(len(query_n), *shape) for shape in shapes]

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
        matrices,
        factors,
        stats,
        eps,
        *([buffer] * groups for buffer in buffers),
        after_group,
        complete=complete,
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
