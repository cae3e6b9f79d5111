"""Mixing that generates its matrices again in backward.

For calls that run again in backward and whose result nobody wants then: the
second run is left with remembering the statistics of the first, and backward
generates the matrices of one group after another.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gradient_sum import GradientSum, new_token, sum_so_far
from . import generated
from .fused import mix


def mix_regenerated(
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    factors: generated.Factors,
    eps: float,
    gradient_sum: GradientSum,
) -> Tensor:
    """As :func:`lors_plugin.ops.generated_mixing`, in one type.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        query (Tensor): Shape (B, N, D).
        weight (Tensor): Of the generator, shape (G (C C + Q P), D).
        bias (Tensor, optional): Of the generator, shape (G (C C + Q P), ).
        factors (tuple[Tensor | None]): See :func:`.fused.forward`.
        eps (float): Added to the variances.
        gradient_sum (GradientSum): Of ``weight``, which it fits; remembers.

    Returns:
        Tensor: Shape (B, N, G, Q, C); in the second run, not computed.
    """
    token = gradient_sum.take(weight, bias)
    stats = gradient_sum.recall()
    out, stats, token = _RegeneratedMixing.apply(
        token, eps, stats, x, query, weight.detach(), bias, *factors
    )
    gradient_sum.remember(stats)
    gradient_sum.give(token)
    return out


def _matrices(query, weight, bias, x):
    groups, points, width = x.shape[2:]
    layers = generated.as_layers(weight, bias, groups, width)
    query = query.flatten(0, 1)

    def generate(group):
        return generated.generate(query, layers[group], width, points)

    return generate


class _RegeneratedMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, eps, stats, x, query, weight, bias, *factors):
        groups, points, width = x.shape[2:]
        out_points = (weight.shape[0] // groups - width**2) // points
        if stats is None:
            matrices = _matrices(query, weight, bias, x)
            args = x, out_points, matrices, factors, eps
            with torch.autocast(x.device.type, enabled=False):
                out, stats = mix(*args, in_place=True)
        else:
            out = x.new_empty(*x.shape[:3], out_points, width)
        ctx.eps = eps
        ctx.save_for_backward(x, query, weight, bias, *factors, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats, new_token(token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _, total):
        if grad_out is None:
            return total, *[None] * 12
        x, query, weight, bias, *factors, stats = ctx.saved_tensors
        needs_query, _, needs_bias = ctx.needs_input_grad[4:7]
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_query, grad_weight, grad_bias, grads = (
                generated.backward(
                    grad_out,
                    x,
                    query,
                    weight,
                    bias,
                    needs_query,
                    True,
                    tuple(factors),
                    None,
                    stats,
                    _matrices(query, weight, bias, x),
                    ctx.eps,
                    sum_so_far(total),
                    complete=False,
                )
            )
        if not needs_bias:
            grad_bias = None
        return (
            grad_weight,
            None,
            None,
            grad_x,
            grad_query,
            None,
            grad_bias,
            *grads,
        )
