"""Dynamic convolution in plain PyTorch, on any device.

A pointwise convolution is a batched matrix product; any other is one grouped
convolution with ``B`` times the groups. Mixed kernels are never kept for
backward: mixing them again costs less than the memory.

On a CPU the kernels are mixed for a chunk of the batch at a time, so that the
allocator hands out memory that it has instead of fresh pages.

Shapes: ``B`` images, ``M`` experts, ``L`` positions.
"""

from collections.abc import Iterator
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import mix_experts

# glibc maps blocks of 32 MB and more anew for each allocation.
CHUNK_BYTES = 16 * 2**20
Geometry = tuple[list, list, list, int]
GradMask = tuple[bool, bool, bool, bool]


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
    """See :func:`lors_plugin.ops.dynamic_conv2d`.

    ``x`` has the type of the result, which has the memory layout of ``x``:
    channels last or contiguous.
    """
    geometry = stride, padding, dilation, groups
    last = is_channels_last(x)
    if not len(x):
        return F.conv2d(x, weight[0].to(x.dtype), None, *geometry)
    convolve = _pointwise if is_pointwise(weight, geometry) else _grouped
    outs = []
    for i in chunks(x, weight):
        kernels = mix_experts(weight, attention[i]).to(x.dtype)
        outs.append(convolve(x[i], kernels, geometry, last))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if bias is not None:
        mixed = mix_experts(bias, attention).to(x.dtype)
        out = out + mixed[..., None, None]
    return out.contiguous(memory_format=memory_format(last))


def conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    geometry: Geometry,
    needed: GradMask,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of :func:`conv2d`.

    Args:
        grad_out (Tensor): Gradient of the result.
        x, weight, attention, bias (Tensor): As in :func:`conv2d`.
        geometry (tuple): Stride, padding, dilation and groups.
        needed (tuple[bool]): Which of the four gradients are needed.

    Returns:
        tuple[Tensor | None]: Gradients of x, weight, attention and bias.
    """
    with_x, with_weight, with_attention, with_bias = needed
    with_kernels = with_weight or with_attention
    # Sums over the batch, in the wider type of the mixture.
    dtype = torch.promote_types(weight.dtype, attention.dtype)
    shares, last = attention.to(dtype), is_channels_last(x)
    grad_weight = grad_attention = grad_bias = None
    backward = _grouped_backward
    if is_pointwise(weight, geometry):
        backward = _pointwise_backward
    grad_xs, grad_attentions = [], []
    for i in chunks(x, weight):
        kernels = mix_experts(weight, attention[i]).to(x.dtype)
        grad_x, grad_kernels = backward(
            grad_out[i], x[i], kernels, geometry, last, with_x, with_kernels
        )
        del kernels
        grad_xs.append(grad_x)
        if not with_kernels:
            continue
        grad_kernels = grad_kernels.reshape(len(shares[i]), -1).to(dtype)
        if with_weight:
            if grad_weight is None:
                grad_weight = shares[i].mT.mm(grad_kernels)
            else:
                grad_weight.addmm_(shares[i].mT, grad_kernels)
        if with_attention:
            experts = weight.flatten(1).to(dtype)
            grad_attentions.append(grad_kernels.mm(experts.mT))
    if with_attention:
        grad_attention = _joined(grad_attentions, attention)
    if bias is not None and (with_bias or with_attention):
        grad_mixed = grad_out.sum((2, 3), dtype=dtype)
        if with_bias:
            grad_bias = shares.mT.mm(grad_mixed).to(bias.dtype)
        if with_attention:
            grad_attention = grad_attention + grad_mixed.mm(bias.to(dtype).mT)
    if with_attention:
        grad_attention = grad_attention.to(attention.dtype)
    if with_weight:
        if grad_weight is None:  # no images
            grad_weight = weight.new_zeros(weight.shape)
        grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
    if not with_x:
        return None, grad_weight, grad_attention, grad_bias
    grad_x = _joined(grad_xs, x)
    grad_x = grad_x.contiguous(memory_format=memory_format(last))
    return grad_x, grad_weight, grad_attention, grad_bias


def is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a convolution is a matrix product per position."""
    stride, padding, _, groups = geometry
    size = weight.shape[3] * weight.shape[4]
    return groups == size == max(stride) == 1 and max(padding) == 0


def output_size(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """Height and width of the result."""
    stride, padding, dilation, _ = geometry
    return [
        (x.shape[2 + i] + 2 * padding[i] - d * (weight.shape[3 + i] - 1) - 1)
        // stride[i]
        + 1
        for i, d in enumerate(dilation)
    ]


def chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the batch whose mixed kernels take ``CHUNK_BYTES`` at most."""
    batch = step = len(x)
    if x.device.type == 'cpu' and not torch.jit.is_tracing():
        kernel = max(weight[0].numel() * weight.element_size(), 1)
        step = min(CHUNK_BYTES // kernel, batch)
    step = max(step, 1)
    for start in range(0, batch, step):
        yield slice(start, start + step)


def is_channels_last(x: Tensor) -> bool:
    """Return whether maps (B, C, H, W) are channels last only."""
    return not x.is_contiguous() and x.is_contiguous(
        memory_format=torch.channels_last
    )


def memory_format(last: bool) -> torch.memory_format:
    """Channels last or contiguous."""
    return torch.channels_last if last else torch.contiguous_format


def _pointwise(x, kernels, geometry, last):
    """``W_b x_b``, or ``x_b W_b^T`` in channels-last maps."""
    kernels = kernels.flatten(2)
    if last:
        return _maps(torch.bmm(_tokens(x, last), kernels.mT), x, last)
    return _maps(torch.bmm(kernels, _tokens(x, last)), x, last)


def _pointwise_backward(
    grad_out, x, kernels, geometry, last, with_x, with_kernels
):
    grad, tokens = _tokens(grad_out, last), _tokens(x, last)
    kernels, grad_x, grad_kernels = kernels.flatten(2), None, None
    if with_x:
        pair = (grad, kernels) if last else (kernels.mT, grad)
        grad_x = _maps(torch.bmm(*pair), x, last)
    if with_kernels:
        pair = (grad.mT, tokens) if last else (grad, tokens.mT)
        grad_kernels = torch.bmm(*pair)
    return grad_x, grad_kernels


def _grouped(x, kernels, geometry, last):
    """One convolution for several images, as groups of one."""
    *rest, groups = geometry
    out = F.conv2d(
        _as_one_image(x, last),
        kernels.flatten(0, 1),
        None,
        *rest,
        len(x) * groups,
    )
    return _as_images(out, len(x))


def _grouped_backward(
    grad_out, x, kernels, geometry, last, with_x, with_kernels
):
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        _as_one_image(grad_out, last),
        _as_one_image(x, last),
        kernels.flatten(0, 1),
        None,
        *geometry[:3],
        False,
        [0, 0],
        len(x) * geometry[3],
        [with_x, with_kernels, False],
    )
    return _as_images(grad_x, len(x)) if with_x else None, grad_kernels


def _as_one_image(x: Tensor, last: bool) -> Tensor:
    """Images as channels of one, (B, C, H, W) to (1, B C, H, W).

    Channels-last images become one image in channels-last layout.
    """
    if len(x) == 1:
        return x
    if last:
        return x.permute(2, 3, 0, 1).flatten(2)[None].permute(0, 3, 1, 2)
    return x.reshape(1, -1, *x.shape[2:])


def _as_images(x: Tensor, number: int) -> Tensor:
    """The reverse of :func:`_as_one_image`, as a view."""
    return x.squeeze(0).unflatten(0, (number, -1))


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The chunks as one batch; without chunks an empty one."""
    if not parts:
        return torch.zeros_like(like)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tokens(x: Tensor, last: bool) -> Tensor:
    """Maps as matrices: (B, C, L), or (B, L, C) in channels-last layout."""
    if last:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.flatten(2)


def _maps(tokens: Tensor, like: Tensor, last: bool) -> Tensor:
    """The reverse of :func:`_tokens`, with the height and width of a map."""
    size = like.shape[2:]
    if last:
        return tokens.unflatten(1, size).permute(0, 3, 1, 2)
    return tokens.unflatten(2, size)
