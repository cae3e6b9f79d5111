"""Dynamic convolution as operators that autograd and the compiler know."""

from typing import Optional

import torch
from torch import Tensor

from . import fused

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
    """See :func:`fused.conv2d`."""
    with _no_autocast(x):
        return fused.conv2d(
            x, weight, attention, bias, stride, padding, dilation, groups
        )


@conv2d.register_fake
def _(x, weight, attention, bias, *geometry):
    size = fused.output_size(x, weight, geometry)
    layout = fused.memory_format(fused.channels_are_last(x))
    shape = len(x), weight.shape[1], *size
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
    """See :func:`fused.conv2d_backward`."""
    tensors = grad_out, x, weight, attention, bias
    geometry = stride, padding, dilation, groups
    with _no_autocast(x):
        grads = fused.conv2d_backward(*tensors, geometry, needed)
    return _filled(x, grads)


@conv2d_backward.register_fake
def _(grad_out, x, weight, attention, bias, *rest):
    inputs = x, weight, attention, bias
    return _fake_grads(inputs, rest[-1])


@torch.library.custom_op(
    'lors_plugin::dynamic_linear',
    mutates_args=(),
    schema=f'({GIVEN}) -> Tensor',
)
def linear(
    x: Tensor, weight: Tensor, attention: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """See :func:`fused.linear`."""
    with _no_autocast(x):
        return fused.linear(x, weight, attention, bias)


@linear.register_fake
def _(x, weight, attention, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op(
    'lors_plugin::dynamic_linear_backward',
    mutates_args=(),
    schema=f'(Tensor grad_out, {GIVEN}, bool[] needed) -> {GRADS}',
)
def linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused.linear_backward`."""
    tensors = grad_out, x, weight, attention, bias
    with _no_autocast(x):
        return _filled(x, fused.linear_backward(*tensors, needed))


@linear_backward.register_fake
def _(grad_out, x, weight, attention, bias, needed):
    return _fake_grads((x, weight, attention, bias), needed)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _filled(like: Tensor, grads: tuple) -> tuple[Tensor, ...]:
    """An operator returns tensors, so what is absent is empty."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _fake_grads(inputs: tuple, needed: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t) if need else inputs[0].new_empty(0)
        for t, need in zip(inputs, needed)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[4:]


def _backward(ctx, grad_out):
    run = conv2d_backward if ctx.geometry else linear_backward
    needed = list(ctx.needs_input_grad[:4])
    grads = run(grad_out, *ctx.saved_tensors, *ctx.geometry, needed)
    grads = [g if need else None for g, need in zip(grads, needed)]
    return *grads, *[None] * len(ctx.geometry)


conv2d.register_autograd(_backward, setup_context=_setup_context)
linear.register_autograd(_backward, setup_context=_setup_context)
