"""Adaptive mixing as operators that autograd and the compiler know."""

import importlib
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

_MODULES = {'torch': 'fused', 'triton': 'triton_kernels'}


def _implementation(backend: str) -> ModuleType:
    # Triton is imported by the first call that needs it.
    return importlib.import_module(f'.{_MODULES[backend]}', __package__)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


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
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*lead, out_points, width),
        x.new_empty(*lead, 4, dtype=wide),
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
    """See :func:`lors_plugin.ops.adaptive_mixing.fused.backward`.

    An operator returns tensors, so what is absent is empty here.
    """
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    with _no_autocast(x):
        grads = _implementation(backend).backward(
            grad_out, x, weights, *factors, stats, eps
        )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@mixing_backward.register_fake
def _(grad_out, x, weights, *rest):
    inputs = x, weights, *rest[:6]
    return tuple(x.new_empty(0 if t is None else t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    *tensors, stats = ctx.saved_tensors
    grads = mixing_backward(grad_out, *tensors, stats, ctx.eps, ctx.backend)
    given = [None if t is None else g for t, g in zip(tensors, grads)]
    return *given, None, None


mixing_forward.register_autograd(_backward, setup_context=_setup_context)
