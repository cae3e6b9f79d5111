"""The definition of dynamic convolution, to be read beside the paper."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a convolution of ``x`` computes in, here and now."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def mix_experts(experts: Tensor, attention: Tensor) -> Tensor:
    """``sum_m a_bm W_m`` for each image.

    Args:
        experts (Tensor): ``W``, shape (M, ...).
        attention (Tensor): ``a``, shape (B, M).

    Returns:
        Tensor: Shape (B, ...), of the wider of both types.
    """
    if torch.is_autocast_enabled(experts.device.type):
        with torch.autocast(experts.device.type, enabled=False):
            return mix_experts(experts, attention)
    if experts.dtype != attention.dtype:
        dtype = torch.promote_types(experts.dtype, attention.dtype)
        experts, attention = experts.to(dtype), attention.to(dtype)
    mixed = attention.mm(experts.flatten(1))
    return mixed.view(len(attention), *experts.shape[1:])


def dynamic_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """See :func:`lors_plugin.ops.dynamic_conv2d`."""
    dtype = compute_dtype(x)
    x, kernels = x.to(dtype), mix_experts(weight, attention).to(dtype)
    offsets = [None] * len(x)
    if bias is not None:
        offsets = mix_experts(bias, attention).to(dtype)
    geometry = stride, padding, dilation, groups
    if not len(x):
        offset = None if bias is None else offsets.sum(0)
        return F.conv2d(x, kernels.sum(0), offset, *geometry)
    return torch.cat(
        [
            F.conv2d(image[None], kernel, offset, *geometry)
            for image, kernel, offset in zip(x, kernels, offsets)
        ]
    )


def dynamic_linear_reference(
    x: Tensor, weight: Tensor, attention: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """See :func:`lors_plugin.ops.dynamic_linear`."""
    dtype = compute_dtype(x)
    x, matrices = x.to(dtype), mix_experts(weight, attention).to(dtype)
    offsets = [None] * len(x)
    if bias is not None:
        offsets = mix_experts(bias, attention).to(dtype)
    if not len(x):
        offset = None if bias is None else offsets.sum(0)
        return F.linear(x, matrices.sum(0), offset)
    return torch.stack(
        [F.linear(*given) for given in zip(x, matrices, offsets)]
    )
