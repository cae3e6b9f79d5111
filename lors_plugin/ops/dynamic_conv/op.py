"""Dynamic convolution as an operator that autograd and compilers know."""

import contextlib
from typing import Optional

import torch
from torch import Tensor

from ..backend import is_plain
from . import grouped

# Schemas are written out, since PyTorch 2.4 reads `list[int]` as none.
GIVEN = 'Tensor x, Tensor weight, Tensor attention, Tensor? bias'
GEOMETRY = (
    'SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups'
)
GRADS = '(Tensor, Tensor, Tensor, Tensor)'


@torch.library.custom_op(
    'lors_plugin::dynamic_conv2d',
    mutates_args=(),
    schema=f'({GIVEN}, {GEOMETRY}) -> Tensor',
)
def conv2d(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """See :func:`grouped.conv2d`."""
    with _no_autocast(x):
        return grouped.conv2d(
            x, weight, attention, bias, stride, padding, dilation, groups
        )


@conv2d.register_fake
def _(x, weight, attention, bias, *geometry):
    size = grouped.output_size(x, weight, geometry)
    layout = grouped.memory_format(grouped.is_channels_last(x))
    shape = x.shape[0], weight.shape[1], *size
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=layout
    )


@torch.library.custom_op(
    'lors_plugin::dynamic_conv2d_backward',
    mutates_args=(),
    schema=f'(Tensor grad_out, {GIVEN}, {GEOMETRY}, bool[] needed) -> {GRADS}',
)
def conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`grouped.conv2d_backward`; what is not needed is empty."""
    geometry = stride, padding, dilation, groups
    grads = _grads(grad_out, x, weight, attention, bias, geometry, needed)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@conv2d_backward.register_fake
def _(grad_out, x, weight, attention, bias, *rest):
    layout = grouped.memory_format(grouped.is_channels_last(x))
    formats = layout, *[torch.contiguous_format] * 3
    return tuple(
        torch.empty_like(t, memory_format=f) if need else x.new_empty(0)
        for t, f, need in zip((x, weight, attention, bias), formats, rest[-1])
    )


def runs_directly(*tensors: Optional[Tensor]) -> bool:
    """Return whether a call needs no autograd and no registered operator.

    The operator takes three times as long as a small convolution. A graph of
    ``torch.jit.trace`` has PyTorch's own operators, to be run anywhere.
    """
    if torch.jit.is_tracing():
        return True
    given = [t for t in tensors if t is not None]
    if not is_plain(given):
        return False
    if torch.is_autocast_enabled(given[0].device.type):
        return False
    return not (
        torch.is_grad_enabled() and any(t.requires_grad for t in given)
    )


def _grads(grad_out, x, weight, attention, bias, geometry, needed):
    with _no_autocast(x):
        return grouped.conv2d_backward(
            grad_out, x, weight, attention, bias, geometry, needed
        )


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[4:]


def _backward(ctx, grad_out):
    tensors, needed = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
    if runs_directly(grad_out, *tensors):
        grads = _grads(grad_out, *tensors, ctx.geometry, needed)
    else:
        grads = conv2d_backward(grad_out, *tensors, *ctx.geometry, needed)
        grads = [g if need else None for g, need in zip(grads, needed)]
    return *grads, None, None, None, None


conv2d.register_autograd(_backward, setup_context=_setup_context)
