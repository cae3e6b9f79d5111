"""A linear layer whose weight is ``W + up down``, which is never formed."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Optional[Tensor] = None,
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

    Returns:
        Tensor: Shape (..., out).
    """
    given = x, weight, down, up
    one_type = all(t.dtype == x.dtype for t in given)
    if not one_type or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
    return _LowRankLinear.apply(*given, bias)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, down, up, bias):
        flat = x.reshape(-1, x.shape[-1])
        hidden = flat @ down.T
        ctx.save_for_backward(x, weight, down, up, hidden)
        out = F.linear(flat, weight, bias).addmm_(hidden, up.T)
        # An ordinary view would forbid an activation in place behind it.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight, down, up, hidden = ctx.saved_tensors
        grad = grad_out.reshape(-1, len(weight))
        grad_hidden = grad @ up
        grads = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = (grad @ weight).addmm_(grad_hidden, down).view_as(x)
        x = x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[1]:
            grads[1] = grad.T @ x
        if ctx.needs_input_grad[2]:
            grads[2] = grad_hidden.T @ x
        if ctx.needs_input_grad[3]:
            grads[3] = grad.T @ hidden
        if ctx.needs_input_grad[4]:
            grads[4] = grad.sum(0)
        return tuple(grads)
