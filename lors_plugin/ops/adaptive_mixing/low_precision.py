"""Generating the matrices and mixing in half precision, on CPUs.

As :mod:`generated`, with what half-precision products of matrices want there:
the weight is cast once for all calls and carries the bias as a column, the
gradient of the weight is made from operands that lie row by row, and it is
added up in the type of the weight itself.
"""

from typing import Optional

import torch
from torch import Tensor

from ..gradient_sum import Products
from ..low_precision import CHUNK
from .fused import Factors, mix, mix_backward, of_group
from .generated import kinds

# Columns behind the weight: the bias, then zeros, so that a row is a whole
# number of cache lines.
EXTRA = 32


def cast(weight: Tensor, bias: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """The generator in another type, shape (G (C C + Q P), D + EXTRA)."""
    rows, width = weight.shape
    out = weight.new_empty(rows, width + EXTRA, dtype=dtype)
    out[:, :width] = weight
    out[:, width:] = 0
    if bias is not None:
        out[:, width] = bias
    return out


def forward(
    x: Tensor, query: Tensor, generator: Tensor, factors: Factors, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Generate and mix.

    Args:
        x (Tensor): Shape (B, N, G, P, C), all tensors of one type.
        query (Tensor): Shape (B, N, D).
        generator (Tensor): What :func:`cast` made.
        factors (tuple[Tensor | None]): See :func:`fused.forward`.
        eps (float): Added to the variances.

    Returns:
        tuple[Tensor]: As :func:`generated.forward`.
    """
    groups, points, width = x.shape[2:]
    query = _widen(query)
    matrices = []
    for rows in kinds(generator, groups, width):
        out = x.new_empty(groups, len(query), rows.shape[1])
        for target, part in zip(out, rows):
            torch.mm(query, part.T, out=target)
        matrices.append(out)
    channel = matrices[0].unflatten(-1, (width, width))
    spatial = matrices[1].unflatten(-1, (-1, points))
    matrices = of_group(channel, spatial)
    out = mix(x, spatial.shape[2], matrices, factors, eps, in_place=True)
    return *out, channel, spatial


def backward(
    grad_out: Tensor,
    x: Tensor,
    query: Tensor,
    generator: Tensor,
    needs_query: bool,
    needs_generator: bool,
    factors: Factors,
    out: Tensor,
    stats: Tensor,
    channel: Tensor,
    spatial: Tensor,
    eps: float,
    total: Optional[Tensor] = None,
    products: Optional[Products] = None,
) -> tuple[
    Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Factors
]:
    """Gradients of the inputs of :func:`forward`.

    That of the weight is float32, and lies in memory column by column. With
    ``total``, it is added to it. With ``products``, those of weight and bias
    are left to them, and None here.

    Returns:
        tuple: Of ``x``, ``query``, weight and bias of the generator, and the
        factors.
    """
    groups, width = x.shape[2], x.shape[4]
    each = len(generator) // groups
    query_n = _widen(query)
    columns = query_n.T.contiguous()
    wide = dict(dtype=torch.float32)
    grad_query = query_n.new_zeros(query_n.shape, **wide)
    grad_weight = grad_bias = None
    left_to_products = needs_generator and products is not None
    if needs_generator and not left_to_products:
        shape = query.shape[-1], len(generator)
        grad_weight = x.new_empty(shape, **wide) if total is None else total.T
        grad_bias = x.new_empty(shape[1:], **wide)
    rows = kinds(generator, groups, width)
    # One group's gradients are used up before the next one's are made, but
    # products want all.
    grads = [
        [torch.empty_like(group) for group in matrices]
        if left_to_products
        else [torch.empty_like(matrices[0])] * groups
        for matrices in (channel, spatial)
    ]

    def after_group(group: int) -> None:
        start = group * each
        for kind, buffers in enumerate(grads):
            grad = buffers[group].flatten(1)
            if needs_query:
                grad_query.add_(grad @ rows[kind][group])
            if grad_weight is not None:
                for part in grad.split(CHUNK, dim=1):
                    where = slice(start, start + part.shape[1])
                    product = columns @ part
                    own = product[: len(grad_weight)]
                    if total is None:
                        grad_weight[:, where] = own
                    else:
                        grad_weight[:, where].add_(own)
                    grad_bias[where] = product[len(grad_weight)]
                    start = where.stop

    grad_x, grad_factors = mix_backward(
        grad_out,
        x,
        of_group(channel, spatial),
        factors,
        stats,
        eps,
        *grads,
        after_group,
        complete=True,
        out=out,
    )
    if left_to_products:
        big = [grad.flatten(1) for pair in zip(*grads) for grad in pair]
        products.add(query.flatten(0, 1), big, transposed=True)
    grad_query = grad_query[:, : query.shape[-1]].to(query.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.T if total is None else total
    return (
        grad_x,
        grad_query.view(query.shape) if needs_query else None,
        grad_weight,
        grad_bias,
        grad_factors,
    )


def _widen(query: Tensor) -> Tensor:
    """Queries (n, D + EXTRA): a one for the bias, then zeros."""
    query = query.flatten(0, 1)
    out = query.new_zeros(len(query), query.shape[1] + EXTRA)
    out[:, : query.shape[1]] = query
    out[:, query.shape[1]] = 1
    return out
