"""Adaptive mixing as one pair of registered operators.

The pair is opaque to autograd, the compiler and exporters, which see shapes,
types and gradients. Which implementation computes is an argument.
"""

import importlib
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

_MODULES = {'torch': 'torch_impl', 'cpu': 'cpu_impl', 'triton': 'triton'}


def _module(implementation: str) -> ModuleType:
    # Triton is imported by the first call that needs it.
    return importlib.import_module(f'.{_MODULES[implementation]}', __package__)


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
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Mix.

    Args:
        x (Tensor): Shape (B, N, G, P, C). All tensors have its type.
        weights (Tensor): Shape (B, N, G, C C + Q P).
        c_left, c_core, c_right (Tensor, optional): Low-rank factors of the
            channel matrices, all or none, shaped as in :class:`LowRank`.
        s_left, s_core, s_right (Tensor, optional): The same for the spatial
            matrices.
        eps (float): Added to the variances.
        implementation (str): 'torch', 'cpu' or 'triton'.

    Returns:
        tuple[Tensor]: The output (B, N, G, Q, C), and in float32 at least
        the statistics (B, N, G, 4) that backward needs: mean and reciprocal
        standard deviation of ``x M``, then those of ``S y``.
    """
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    with torch.autocast(x.device.type, enabled=False):
        return _module(implementation).forward(x, weights, factors, eps)


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
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the inputs of :func:`mixing_forward`.

    Returns:
        tuple[Tensor]: Of ``x``, ``weights`` and the six factors; empty for
        absent factors, since an operator returns tensors.
    """
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    with torch.autocast(x.device.type, enabled=False):
        grads = _module(implementation).backward(
            grad_out, x, weights, factors, stats, eps
        )
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@mixing_backward.register_fake
def _(grad_out, x, weights, *rest):
    *factors, _, _, implementation = rest
    grad_x = x.new_empty(x.shape)
    if implementation != 'triton':
        grad_x = empty_by_group(x)
    return (
        grad_x,
        weights.new_empty(weights.shape),
        *(x.new_empty(0 if t is None else t.shape) for t in factors),
    )


def empty_by_group(x: Tensor) -> Tensor:
    """Allocate the gradient of ``x`` one group after another, as sampling,
    which comes before, lays its output out."""
    batch, queries, groups, *sizes = x.shape
    out = x.new_empty(groups, batch, queries, *sizes)
    return out.permute(1, 2, 0, 3, 4)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    *tensors, stats = ctx.saved_tensors
    grads = mixing_backward(
        grad_out, *tensors, stats, ctx.eps, ctx.implementation
    )
    given = [None if t is None else g for t, g in zip(tensors, grads)]
    return *given, None, None


mixing_forward.register_autograd(_backward, setup_context=_setup_context)
