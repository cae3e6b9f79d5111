"""A linear layer whose weight is ``W + up down``, which is never formed."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gradient_sum import GradientSum, new_token


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Optional[Tensor] = None,
    gradient_sum: Optional[GradientSum] = None,
) -> Tensor:
    """Apply ``W + up down`` and a bias (LORS, eq. 5).

    Equals two linear layers whose results are added. Both read ``x``; where
    types allow, their gradients of ``x`` are added in place, which for a wide
    ``x`` is the larger part of what the low rank costs. Autocast casts as for
    any linear layer.

    Args:
        x (Tensor): Shape (..., in).
        weight (Tensor): ``W``, shape (out, in).
        down (Tensor): Shape (r, in).
        up (Tensor): Shape (out, r).
        bias (Tensor, optional): Shape (out, ). Defaults to None.
        gradient_sum (GradientSum, optional): Of ``weight``, where calls of
            one forward pass share it; used where it fits.

    Returns:
        Tensor: Shape (..., out).
    """
    given = x, weight, down, up
    one_type = all(t.dtype == x.dtype for t in given)
    if not one_type or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
    if gradient_sum is None or not gradient_sum.fits(weight, bias):
        return _LowRankLinear.apply(None, *given, bias)
    token = gradient_sum.take(weight)
    out, token = _LowRankLinear.apply(token, *given, bias)
    gradient_sum.give(token)
    return out


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, x, weight, down, up, bias):
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ down.T
        ctx.save_for_backward(x, weight, down, up, hidden)
        out = F.linear(flat, weight, bias).addmm_(hidden, up.T)
        # An ordinary view would forbid an activation in place behind it.
        shape = *x.shape[:-1], len(weight)
        out = torch.ops.aten._unsafe_view(out, shape)
        if token is None:
            return out
        ctx.set_materialize_grads(False)
        return out, new_token(token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, total=None):
        if grad_out is None:
            return total, *[None] * 5
        x, weight, down, up, hidden = ctx.saved_tensors
        grad = grad_out.reshape(-1, len(weight))
        grad_hidden = grad @ up
        grads = [None] * 6
        if ctx.needs_input_grad[1]:
            grads[1] = (grad @ weight).addmm_(grad_hidden, down).view_as(x)
        x = x.reshape(-1, x.shape[-1])
        if total is not None:
            grads[0] = total.addmm_(grad.T, x)
        elif ctx.needs_input_grad[0]:
            grads[0] = grad.T @ x
        elif ctx.needs_input_grad[2]:
            grads[2] = grad.T @ x
        if ctx.needs_input_grad[3]:
            grads[3] = grad_hidden.T @ x
        if ctx.needs_input_grad[4]:
            grads[4] = grad.T @ hidden
        if ctx.needs_input_grad[5]:
            grads[5] = grad.sum(0)
        return tuple(grads)
