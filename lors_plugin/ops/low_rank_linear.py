"""A linear layer whose weight is ``W + up down``, which is never formed."""

from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gradient_sum import GradientSum, new_token, sum_so_far
from .low_precision import CHUNK, in_low_precision
from .memory import new_large


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
    low = None
    if torch.is_autocast_enabled(x.device.type):
        if not in_low_precision(weight, x, down, up, bias):
            return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
        dtype = torch.get_autocast_dtype(x.device.type)
        make = partial(weight.detach().to, dtype)
        low = (
            make() if gradient_sum is None else gradient_sum.make(dtype, make)
        )
        x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif any(t.dtype != x.dtype for t in (weight, down, up)):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)
    kept = (weight,) if low is not None else (weight, bias)
    if gradient_sum is None or not gradient_sum.fits(*kept):
        return _LowRankLinear.apply(None, x, weight, down, up, bias, low, None)
    token = gradient_sum.take(weight)
    products = None if low is None else gradient_sum.products
    out, token = _LowRankLinear.apply(
        token, x, weight, down, up, bias, low, products
    )
    gradient_sum.give(token)
    return out


class _LowRankLinear(torch.autograd.Function):
    """With ``low``, the weight in half precision, products are in its type.

    The gradient of the weight is added up in the weight's own type; with
    ``products``, it is left to them.
    """

    @staticmethod
    def forward(ctx, token, x, weight, down, up, bias, low, products):
        ctx.wide, ctx.products = weight.dtype, products
        weight = weight if low is None else low
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            hidden = flat @ down.T
            out = F.linear(flat, weight, bias).addmm_(hidden, up.T)
        ctx.save_for_backward(x, weight, down, up, hidden)
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
            return total, *[None] * 7
        x, weight, down, up, hidden = ctx.saved_tensors
        token, needs_x, needs_weight, *needs = ctx.needs_input_grad[:6]
        grads = [None] * 8
        with torch.autocast(x.device.type, enabled=False):
            grad = grad_out.reshape(-1, len(weight))
            grad_hidden = grad @ up
            if needs_x:
                product = (grad @ weight).addmm_(grad_hidden, down)
                grads[1] = product.view_as(x)
            x = x.reshape(-1, x.shape[-1])
            if ctx.products is not None:
                ctx.products.add(grad, [x])
                if total is None:
                    total = new_token(grad, weight.shape, ctx.wide)
                grads[0] = total
            elif token or needs_weight:
                so_far = sum_so_far(total)
                product = _add_product(so_far, grad, x, ctx.wide)
                grads[0 if token else 2] = product
            if needs[0]:
                # In half precision, products want rows without gaps.
                grads[3] = grad_hidden.T.contiguous() @ x
            if needs[1]:
                grads[4] = grad.T @ hidden
            if needs[2]:
                grads[5] = grad.sum(0)
        return tuple(grads)


def _add_product(
    total: Optional[Tensor], grad: Tensor, x: Tensor, wide: torch.dtype
) -> Tensor:
    """``total + grad.T x`` in a type, in place where there is a total."""
    if x.dtype == wide:
        if total is not None:
            return total.addmm_(grad.T, x)
        out = new_large(x, (grad.shape[1], x.shape[1]))
        return torch.mm(grad.T, x, out=out)
    # Products of matrices in half precision are twice as fast row by row.
    grad = grad.T.contiguous()
    if total is None:
        out = new_large(x, (len(grad), x.shape[1]), wide)
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        product = grad @ x[:, part]
        if total is None:
            out[:, part] = product
        else:
            total[:, part].add_(product)
    return out if total is None else total
