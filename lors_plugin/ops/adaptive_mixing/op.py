"""Adaptive mixing as operators that autograd and the compiler know."""

import importlib
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gradient_sum import new_token, sum_so_far
from . import generated, low_precision
from .fused import of_group
from .layout import empty_as

_MODULES = {'torch': 'fused', 'triton': 'triton_kernels'}


def _implementation(backend: str) -> ModuleType:
    # Triton is imported by the first call that needs it.
    return importlib.import_module(f'.{_MODULES[backend]}', __package__)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _filled(like: Tensor, *grads: Optional[Tensor]) -> tuple[Tensor, ...]:
    """An operator returns tensors, so what is absent is empty."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _given(tensors: list, grads: tuple) -> list:
    return [None if t is None else g for t, g in zip(tensors, grads)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op(
    'lors_plugin::adaptive_mixing_forward', mutates_args=()
)
def mixing_forward(
    x: Tensor,
    weights: Tensor,
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`lors_plugin.ops.adaptive_mixing.fused.forward`."""
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    with _no_autocast(x):
        return _implementation(backend).forward(x, weights, *factors, eps)


@mixing_forward.register_fake
def _(x, weights, *rest):
    *lead, points, width = x.shape
    out_points = (weights.shape[-1] - width**2) // points
    return (
        x.new_empty(*lead, out_points, width),
        x.new_empty(*lead, 4, dtype=_wide(x.dtype)),
    )


@torch.library.custom_op(
    'lors_plugin::adaptive_mixing_backward', mutates_args=()
)
def mixing_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    stats: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lors_plugin.ops.adaptive_mixing.fused.backward`."""
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    with _no_autocast(x):
        grads = _implementation(backend).backward(
            grad_out, x, weights, *factors, stats, eps
        )
    return _filled(x, *grads)


@mixing_backward.register_fake
def _(grad_out, x, weights, *rest):
    in_groups = rest[-1] == 'torch'
    return (
        empty_as(x) if in_groups else x.new_empty(x.shape),
        *(
            x.new_empty(0 if t is None else t.shape)
            for t in (weights, *rest[:6])
        ),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    *tensors, stats = ctx.saved_tensors
    grads = mixing_backward(grad_out, *tensors, stats, ctx.eps, ctx.backend)
    return *_given(tensors, grads), None, None


mixing_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    'lors_plugin::generated_mixing_forward', mutates_args=()
)
def generated_forward(
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lors_plugin.ops.adaptive_mixing.generated.forward`."""
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    return generated.forward(x, query, weight, bias, factors, eps)


@generated_forward.register_fake
def _(x, query, weight, *rest):
    batch, queries, groups, points, width = x.shape
    out_points = (weight.shape[0] // groups - width**2) // points
    number = batch * queries
    return (
        x.new_empty(batch, queries, groups, out_points, width),
        x.new_empty(batch, queries, groups, 4, dtype=_wide(x.dtype)),
        x.new_empty(groups, number, width, width),
        x.new_empty(groups, number, out_points, points),
    )


@torch.library.custom_op(
    'lors_plugin::generated_mixing_backward', mutates_args=()
)
def generated_backward(
    grad_out: Tensor,
    x: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    needs_query: bool,
    needs_generator: bool,
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    out: Tensor,
    stats: Tensor,
    channel: Tensor,
    spatial: Tensor,
    eps: float,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """See :func:`lors_plugin.ops.adaptive_mixing.generated.backward`."""
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    *grads, grad_factors = generated.backward(
        grad_out,
        x,
        query,
        weight,
        bias,
        needs_query,
        needs_generator,
        factors,
        out,
        stats,
        of_group(channel, spatial),
        eps,
    )
    return _filled(x, *grads, *grad_factors)


@generated_backward.register_fake
def _(grad_out, x, query, weight, bias, needs_query, needs_generator, *rest):
    rows = weight.shape[0]
    return (
        empty_as(x),
        x.new_empty(query.shape if needs_query else 0),
        x.new_empty(weight.shape if needs_generator else 0),
        x.new_empty(rows if bias is not None and needs_generator else 0),
        *(x.new_empty(0 if t is None else t.shape) for t in rest[:6]),
    )


def _generated_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _generated_backward(ctx, grad_out, *_):
    *tensors, out, stats, channel, spatial = ctx.saved_tensors
    x, query, weight, bias, *factors = tensors
    grads = generated_backward(
        grad_out,
        x,
        query,
        weight,
        bias,
        ctx.needs_input_grad[1],
        any(ctx.needs_input_grad[2:4]),
        *factors,
        out,
        stats,
        channel,
        spatial,
        ctx.eps,
    )
    grads = [
        grad if needed else None
        for grad, needed in zip(grads, ctx.needs_input_grad)
    ]
    return *_given(tensors, grads), None


generated_forward.register_autograd(
    _generated_backward, setup_context=_generated_setup
)


class SharedGeneratedMixing(torch.autograd.Function):
    """The same for calls that share a generator, see :class:`GradientSum`.

    ``packed`` is what :func:`generated.pack` made of it, or None. With a
    token, the gradient of the weight is added up along tokens.
    """

    @staticmethod
    def forward(ctx, token, eps, packed, x, query, weight, bias, *factors):
        if packed is None:
            out, stats, channel, spatial = generated_forward(
                x, query, weight, bias, *factors, eps
            )
        else:
            with _no_autocast(x):
                out, stats, channel, spatial = generated.forward_packed(
                    x, query, bias, packed, factors, eps, keep=True
                )
        ctx.eps = eps
        ctx.save_for_backward(
            *(x, query, weight, bias, *factors),
            *(out, stats, *channel, *spatial),
        )
        ctx.set_materialize_grads(False)
        return out, None if token is None else new_token(token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, total):
        if grad_out is None:
            return total, *[None] * 12
        x, query, weight, bias, *rest = ctx.saved_tensors
        factors, (out, stats, *matrices) = rest[:6], rest[6:]
        token, _, _, _, needs_query, needs_weight, needs_bias = (
            ctx.needs_input_grad[:7]
        )
        with _no_autocast(x):
            grad_x, grad_query, grad_weight, grad_bias, grads = (
                generated.backward(
                    grad_out,
                    x,
                    query,
                    weight,
                    bias,
                    needs_query,
                    token or needs_weight or needs_bias,
                    tuple(factors),
                    out,
                    stats,
                    of_group(*_halves(matrices)),
                    ctx.eps,
                    sum_so_far(total),
                )
            )
        return (
            grad_weight if token else None,
            None,
            None,
            grad_x,
            grad_query,
            grad_weight if needs_weight and not token else None,
            grad_bias if needs_bias else None,
            *grads,
        )


def _halves(matrices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    groups = len(matrices) // 2
    return matrices[:groups], matrices[groups:]


class LowPrecisionMixing(torch.autograd.Function):
    """Generate and mix in half precision, see :mod:`low_precision`.

    ``low`` is what :func:`low_precision.cast` made of ``weight`` and
    ``bias``, which are here for their gradients alone. With a token, those
    are made along tokens: with ``products``, at their start.
    """

    @staticmethod
    def forward(
        ctx, token, eps, low, products, x, query, weight, bias, *factors
    ):
        with _no_autocast(x):
            out, *kept = low_precision.forward(x, query, low, factors, eps)
        ctx.eps, ctx.products = eps, products
        ctx.save_for_backward(low, x, query, *factors, out, *kept)
        ctx.set_materialize_grads(False)
        return out, None if token is None else new_token(token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, total):
        if grad_out is None:
            return total, *[None] * 13
        low, x, query, *rest = ctx.saved_tensors
        factors, (out, stats, channel, spatial) = rest[:6], rest[6:]
        token, _, _, _, _, needs_query, needs_weight, needs_bias = (
            ctx.needs_input_grad[:8]
        )
        products = ctx.products if token else None
        with _no_autocast(x):
            grad_x, grad_query, grad_weight, grad_bias, grads = (
                low_precision.backward(
                    grad_out,
                    x,
                    query,
                    low,
                    needs_query,
                    token or needs_weight or needs_bias,
                    tuple(factors),
                    out,
                    stats,
                    channel,
                    spatial,
                    ctx.eps,
                    sum_so_far(total),
                    products,
                )
            )
        if products is not None:
            if total is None:
                shape = len(low), query.shape[-1]
                total = new_token(low, shape, torch.float32)
            grad_weight = total
        return (
            grad_weight if token else None,
            None,
            None,
            None,
            grad_x,
            grad_query,
            grad_weight if needs_weight and not token else None,
            grad_bias if needs_bias else None,
            *grads,
        )
