"""Normalisation as a part of the convolution before it, in inference."""

from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.models.layers import DynamicConv2d
from lors_plugin.ops.dynamic_conv import chooses_reference, side_by_side

# A forward that somebody replaced is not stepped over.
_FORWARDS = {
    module: module.forward
    for module in (DynamicConv2d, nn.Conv2d, nn.BatchNorm2d, nn.Hardswish)
}


def is_bare_inference(x: Tensor) -> bool:
    """Whether maps are computed here and now, without any bookkeeping.

    That is on a CPU in float32 or float64, without gradients, autocast,
    compiler, tracer or tensors that are more than numbers.
    """
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def can_fold(conv: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Whether :func:`fold` does what both modules do one after the other.

    Args:
        conv (nn.Module): The convolution.
        norm (nn.Module): The normalisation.
        x (Tensor): What is convolved.
    """
    return (
        is_bare_inference(x)
        and is_as_made(conv, DynamicConv2d, nn.Conv2d)
        and is_as_made(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.track_running_stats
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and conv.weight.dtype == x.dtype == norm.running_var.dtype
        and not chooses_reference(getattr(conv, 'backend', 'auto'))
    )


def is_as_made(module: Optional[nn.Module], *types: type) -> bool:
    """Whether a module is of a type and nobody changed or watches it.

    Args:
        module (nn.Module, optional): Any.
        types (type): Of this module.
    """
    kind = type(module)
    return (
        kind in types
        and kind.forward is _FORWARDS[kind]
        and 'forward' not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def fold(conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``norm(conv(x))`` by a convolution with a scaled kernel and a shift.

    The small kernels are scaled at each call, so that nothing goes stale.

    Args:
        conv (DynamicConv2d | nn.Conv2d): The convolution.
        norm (nn.BatchNorm2d): In evaluation mode.
        x (Tensor): Shape (B, C_in, H, W).

    Returns:
        Tensor: New, shape (B, C_out, H_out, W_out).
    """
    scale = (norm.running_var + norm.eps).rsqrt_()
    if norm.affine:
        scale.mul_(norm.weight)
        shift = norm.bias.addcmul(norm.running_mean, scale, value=-1)
    else:
        shift = -norm.running_mean * scale
    if isinstance(conv, DynamicConv2d):
        kernels, offsets = conv.mix(side_by_side.mean(x))
    else:
        kernels, offsets = conv.weight, conv.bias
    if offsets is not None:
        shift = torch.addcmul(shift, offsets, scale)
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    if kernels.dim() == 5:
        return side_by_side.conv2d(x, kernels, scale, shift, *geometry)
    if conv.groups == conv.in_channels and side_by_side.is_laid(x):
        kernels = kernels.expand(len(x), *kernels.shape)
        return side_by_side.conv2d(x, kernels, scale, shift, *geometry)
    kernels = kernels * scale[:, None, None, None]
    return nn.functional.conv2d(x, kernels, shift, *geometry)
