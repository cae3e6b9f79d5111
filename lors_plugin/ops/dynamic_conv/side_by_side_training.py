"""Gradients of convolutions of images that lie side by side in memory.

Maps are those of :mod:`lors_plugin.ops.dynamic_conv.side_by_side`, shape
(L, B, C). Mixed kernels and normalised maps are not kept for backward: they
are computed again, which costs less than memory that is fetched anew.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fused import Sums, pieces
from .reference import mix_experts
from .side_by_side import Pair, as_one_image, multiply

aten = torch.ops.aten


class Activation(NamedTuple):
    """In place, and its gradient from that of the result and the input."""

    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def pointwise(
    parts: Sequence[Tensor], weight: Tensor, attention: Optional[Tensor]
) -> Tensor:
    """Multiply each place with the image's kernel.

    Args:
        parts (Sequence[Tensor]): Shapes (L, B, C_i), together ``C_in``.
        weight (Tensor): Experts, shape (M, C_out, C_in, 1, 1).
        attention (Tensor, optional): Shape (B, M); None for one expert.

    Returns:
        Tensor: Shape (L, B, C_out).
    """
    return _Pointwise.apply(weight, attention, *parts)


def depthwise(
    maps: Tensor,
    size: Pair,
    weight: Tensor,
    attention: Optional[Tensor],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Pair]:
    """Convolve each channel with its own kernel.

    Args:
        maps (Tensor): Shape (L, B, C).
        size (tuple[int]): Height and width.
        weight (Tensor): Experts, shape (M, C, 1, kh, kw).
        attention (Tensor, optional): Shape (B, M); None for one expert.
        stride, padding, dilation (tuple[int]): As (y, x).

    Returns:
        tuple[Tensor, tuple[int]]: Shape (L', B, C), and its height and width.
    """
    geometry = stride, padding, dilation
    out = _Depthwise.apply(maps, weight, attention, size, geometry)
    return out.flatten(0, 1), tuple(out.shape[:2])


def normalize(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: Optional[Activation],
) -> Tensor:
    """Batch normalisation, then an activation.

    Args:
        maps (Tensor): Shape (L, B, C).
        weight, bias, running_mean, running_var (Tensor): Shape (C,); the
            running ones are written in training.
        training (bool): Whether to take the statistics of the maps.
        momentum (float): Share of those in the running ones.
        eps (float): Added to the variance.
        activation (Activation, optional): None for none.

    Returns:
        Tensor: Shape (L, B, C).

    Raises:
        ValueError: If there is one value a channel only, in training.
    """
    if training and maps.shape[0] * maps.shape[1] == 1:
        raise ValueError(
            'batch normalisation in training needs more than one value a '
            f'channel, got one image with maps of one place and '
            f'{maps.shape[2]} channels: give more or larger images'
        )
    statistics = running_mean, running_var, training, momentum, eps
    return _Normalize.apply(maps, weight, bias, statistics, activation)


def _needed(ctx, weight: int, attention: int) -> tuple[bool, ...]:
    """For :class:`Sums`: x, weight, attention, bias."""
    needs = ctx.needs_input_grad
    return False, needs[weight], needs[attention], False


class _Pointwise(Function):
    @staticmethod
    def forward(ctx, weight, attention, *parts):
        ctx.save_for_backward(weight, attention, *parts)
        places, batch, _ = parts[0].shape
        out = parts[0].new_empty(places, batch, weight.shape[1])
        if attention is None:
            return multiply(parts, weight.flatten(2), out)
        for i in pieces(parts[0][0], weight):
            kernels = mix_experts(weight, attention[i]).flatten(2)
            multiply([part[:, i] for part in parts], kernels, out[:, i])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weight, attention, *parts = ctx.saved_tensors
        grads = [
            part.new_empty(part.shape) if need else None
            for part, need in zip(parts, ctx.needs_input_grad[2:])
        ]
        if attention is None:
            grad_out = grad_out.contiguous()
            grad_weight = _multiply_backward(
                grad_out, parts, weight[0].flatten(1), grads,
                ctx.needs_input_grad[0],
            )  # fmt: skip
            if grad_weight is not None:
                grad_weight = grad_weight.view(weight.shape)
            return grad_weight, None, *grads
        sums = Sums(weight, attention, None, _needed(ctx, 0, 1))
        for i in pieces(parts[0][0], weight):
            grad_kernels = _multiply_backward(
                grad_out[:, i],
                [part[:, i] for part in parts],
                mix_experts(weight, attention[i]).flatten(2),
                [None if grad is None else grad[:, i] for grad in grads],
                sums.of_kernels,
            )
            sums.add(i, grad_kernels, grad_out, ())
        grad_weight, grad_attention, _ = sums.results()
        return grad_weight, grad_attention, *grads


def _multiply_backward(grad_out, parts, kernels, grads, of_kernels):
    """Write the gradients of parts into ``grads``; return that of kernels.

    Args:
        grad_out (Tensor): Shape (L, b, C_out).
        parts (list[Tensor]): Shapes (L, b, C_i).
        kernels (Tensor): Shape (b, C_out, C_in), or (C_out, C_in) for all.
        grads (list[Tensor | None]): As the parts, None where not needed.
        of_kernels (bool): Whether the gradient of kernels is needed.
    """

    def as_rows(maps):
        return maps.flatten(0, 1) if shared else maps.transpose(0, 1)

    shared = kernels.dim() == 2
    grad_rows, start = as_rows(grad_out), 0
    grad_kernels = torch.empty_like(kernels) if of_kernels else None
    for part, grad in zip(parts, grads):
        columns = slice(start, start + part.shape[2])
        if grad is not None:
            torch.matmul(grad_rows, kernels[..., columns], out=as_rows(grad))
        if of_kernels:
            found = grad_kernels[..., columns]
            torch.matmul(grad_rows.mT, as_rows(part), out=found)
        start = columns.stop
    return grad_kernels


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, maps, weight, attention, size, geometry):
        ctx.save_for_backward(maps, weight, attention)
        ctx.size, ctx.geometry = size, geometry
        kernels = _kernels_of_all(maps, weight, attention)
        out = F.conv2d(
            as_one_image(maps, size), kernels, None, *geometry, len(kernels)
        )
        out = out.permute(0, 2, 3, 1)[0]
        return out.unflatten(2, maps.shape[1:]).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        maps, weight, attention = ctx.saved_tensors
        kernels = _kernels_of_all(maps, weight, attention)
        out_size = grad_out.shape[:2]
        grad_out = grad_out.flatten(0, 1).contiguous()
        given = as_one_image(grad_out, out_size), as_one_image(maps, ctx.size)
        sums = None
        if attention is not None:
            sums = Sums(weight, attention, None, _needed(ctx, 1, 2))
        of_kernels = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_maps, grad_kernels = _depthwise_backward(
            *given, kernels, ctx.geometry, ctx.needs_input_grad[0], of_kernels
        )
        if grad_maps is not None:
            grad_maps = grad_maps.permute(0, 2, 3, 1).reshape(maps.shape)
        grad_weight = grad_attention = None
        if of_kernels:
            grad_kernels = grad_kernels.reshape(
                maps.shape[1], *weight.shape[1:]
            )
            if sums is None:
                grad_weight = grad_kernels.sum(0, keepdim=True)
            else:
                everything = slice(0, maps.shape[1])
                sums.add(everything, grad_kernels, grad_out, ())
                grad_weight, grad_attention, _ = sums.results()
        return grad_maps, grad_weight, grad_attention, None, None


def _kernels_of_all(maps, weight, attention):
    """Shape (B C, 1, kh, kw)."""
    if attention is None:
        kernels = weight.expand(maps.shape[1], -1, -1, -1, -1)
    else:
        kernels = mix_experts(weight, attention)
    return kernels.flatten(0, 1)


def _depthwise_backward(grad_out, x, kernels, geometry, of_x, of_kernels):
    """Of one image whose channels are last in memory."""
    stride, padding, dilation = geometry
    rest = False, [0, 0], len(kernels)
    # Libraries have no fast gradient of large kernels with a stride.
    apart = of_kernels and max(stride) > 1 and max(kernels.shape[2:]) > 3
    apart = apart and max(dilation) == 1
    grad_x, grad_kernels = None, None
    if of_x or not apart:
        grad_x, grad_kernels, _ = aten.convolution_backward(
            grad_out, x, kernels, None, stride, padding, dilation, *rest,
            [of_x, of_kernels and not apart, False],
        )  # fmt: skip
    if apart:
        grad_kernels = _strided_kernel_gradient(
            grad_out, x, kernels.shape[2:], stride, padding
        )
    return grad_x, grad_kernels


def _strided_kernel_gradient(grad_out, x, size, stride, padding):
    """The gradient of the kernels of a depth-wise convolution with a stride.

    Every ``stride``-th row of the kernel meets every ``stride``-th row of the
    input only, so it is the gradient of a few small convolutions without one.
    """
    channels, (height, width) = x.shape[1], grad_out.shape[2:]
    grad = x.new_empty(channels, 1, *size)
    # Room for all that a kernel reaches, and no more.
    ends = [
        (out - 1) * step + kernel - padded - length
        for out, step, kernel, padded, length in zip(
            (height, width), stride, size, padding, x.shape[2:]
        )
    ]
    x = F.pad(x, (padding[1], ends[1], padding[0], ends[0]))
    for i in range(min(stride[0], size[0])):
        for j in range(min(stride[1], size[1])):
            part = grad[:, :, i :: stride[0], j :: stride[1]]
            rows, columns = part.shape[2:]
            phase = x[:, :, i :: stride[0], j :: stride[1]]
            phase = phase[:, :, : height + rows - 1, : width + columns - 1]
            _, found, _ = aten.convolution_backward(
                grad_out,
                phase.contiguous(memory_format=torch.channels_last),
                grad.new_empty(channels, 1, rows, columns),
                None, [1, 1], [0, 0], [1, 1], False, [0, 0], channels,
                [False, True, False],
            )  # fmt: skip
            part.copy_(found)
    return grad


class _Normalize(Function):
    @staticmethod
    def forward(ctx, maps, weight, bias, statistics, activation):
        running_mean, running_var, training, momentum, eps = statistics
        out, mean, scale = aten.native_batch_norm(
            _channels_second(maps), weight, bias, *statistics
        )
        if not training:
            mean, scale = running_mean, running_var
        ctx.save_for_backward(maps, weight, bias, mean, scale)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        out = out.permute(0, 2, 3, 1).reshape(maps.shape)
        return out if activation is None else activation.apply_(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        maps, weight, bias, mean, scale = ctx.saved_tensors
        running = None, None
        if not ctx.training:
            running = mean, scale
            scale = (scale + ctx.eps).rsqrt_()
        grad = grad.contiguous()
        if ctx.activation is not None:
            factor = scale * weight
            shift = bias.addcmul(mean, factor, value=-1)
            normal = torch.addcmul(shift, maps, factor)
            grad = ctx.activation.backward(grad, normal)
            del normal
        grads = aten.native_batch_norm_backward(
            _channels_second(grad), _channels_second(maps), weight, *running,
            mean, scale, ctx.training, ctx.eps, ctx.needs_input_grad[:3],
        )  # fmt: skip
        grad_maps = grads[0]
        if grad_maps is not None and ctx.needs_input_grad[0]:
            grad_maps = grad_maps.permute(0, 2, 3, 1).reshape(maps.shape)
        return grad_maps, grads[1], grads[2], None, None


def _channels_second(maps):
    """(L, B, C) as (L, C, B, 1) with channels last in memory."""
    return maps.unsqueeze(2).permute(0, 3, 1, 2)
