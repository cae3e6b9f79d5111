"""Convolution, norm and activation in one step, for inference on a CPU."""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.ops.dynamic_conv.side_by_side import (
    KernelSpace,
    Pair,
    convolve_images,
    depthwise,
    pointwise,
)

from .dynamic_conv import DynamicConv2d
from .ghost import ConvNorm
from .routing import ExpertRouter

ACTIVATIONS: dict[type, Callable[[Tensor], Tensor]] = {
    nn.Hardswish: lambda x: F.hardswish(x, inplace=True),
    nn.ReLU: F.relu_,
    nn.SiLU: lambda x: F.silu(x, inplace=True),
}
# Parts of a map, each with some of its channels.
Parts = Sequence[Tensor]


class Unsupported(Exception):
    """A part of the network is none that the program knows."""


class Frame:
    """What one call needs: folded norms, and memory for mixed kernels."""

    def __init__(self, layers: list['Layer'], x: Tensor, batch: int) -> None:
        # All norms at once: a few operations instead of some a layer.
        mean, var, weight, bias = (
            torch.cat(values)
            for values in zip(*(layer.norm_values for layer in layers))
        )
        scale = var.add_(layers[0].norm.eps).rsqrt_().mul_(weight)
        shift = bias.addcmul_(mean, scale, value=-1)
        sizes = [len(layer.norm_values[0]) for layer in layers]
        self.scales, self.shifts = scale.split(sizes), shift.split(sizes)
        self.columns = scale.view(-1, 1, 1, 1).split(sizes)
        for layer, scale, shift in zip(layers, self.scales, self.shifts):
            if layer.bias is not None:
                shift.addcmul_(layer.bias, scale)
        self.kernels = KernelSpace(
            x, batch * max(layer.num_mixed for layer in layers)
        )


class Layer:
    """A convolution, its norm and activation."""

    def __init__(self, part: nn.Module, kind: str, index: int) -> None:
        check_type(part, ConvNorm)
        check_type(part.norm, nn.BatchNorm2d)
        check_type(part.conv, DynamicConv2d, nn.Conv2d)
        self.conv, self.norm, self.index = part.conv, part.norm, index
        self.act = activation_of(part.act)
        self.weight, self.bias = self.conv.weight, self.conv.bias
        self.router, self.num_mixed = None, 0
        if type(self.conv) is DynamicConv2d and self.conv.routing is not None:
            check_type(self.conv.routing, ExpertRouter)
            self.router = _Router(self.conv.routing)
            self.num_mixed = self.weight[0].numel()
        norm = self.norm
        self.norm_values = (
            norm.running_mean, norm.running_var, norm.weight, norm.bias
        )  # fmt: skip
        if any(value is None for value in self.norm_values):
            raise Unsupported(f'{norm} without statistics or weights')
        _check_geometry(self.conv, kind)
        self.built = self._options()
        self.places = 1, *self.conv.kernel_size

    def _options(self) -> tuple:
        conv = self.conv
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        return *geometry, self.norm.eps

    def is_as_built(self) -> bool:
        """Whether nobody changed its options."""
        return self._options() == self.built

    def pointwise(self, parts: Parts, pooled: Tensor, frame: Frame) -> Tensor:
        """Parts of a map and their mean (B, C) to a map."""
        scale, shift = frame.scales[self.index], frame.shifts[self.index]
        kernels = self._kernels(pooled, frame)
        return self.act(pointwise(parts, kernels, scale, shift))

    def depthwise(
        self,
        maps: Tensor,
        size: Pair,
        pooled: Optional[Tensor],
        frame: Frame,
        channels: Optional[slice] = None,
    ) -> tuple[Tensor, Pair]:
        """Some channels of a map, of a size, to those and the new size."""
        scale, shift = frame.columns[self.index], frame.shifts[self.index]
        kernels = self._kernels(pooled, frame)
        kernels = kernels.view(-1, scale.shape[0], *self.places) * scale
        if channels is not None:
            kernels, shift = kernels[:, channels], shift[channels]
        out, size = depthwise(maps, size, kernels, shift, *self.built[:3])
        return self.act(out), size

    def images(self, images: Tensor, frame: Frame) -> tuple[Tensor, Pair]:
        """Images (B, C, H, W) to a map and its size."""
        scale, shift = frame.columns[self.index], frame.shifts[self.index]
        kernels = self._kernels(images.mean((2, 3)), frame)
        kernels = kernels.view(-1, *self.weight.shape[-4:]) * scale
        out, size = convolve_images(images, kernels, shift, *self.built[:3])
        return self.act(out), size

    def _kernels(self, pooled: Optional[Tensor], frame: Frame) -> Tensor:
        """Shape (B or 1, numbers of a kernel)."""
        if self.router is not None:
            return frame.kernels.mix(self.weight, self.router(pooled))
        return self.weight.reshape(1, -1)


class _Router:
    """:class:`ExpertRouter` in the type of its weights."""

    def __init__(self, router: ExpertRouter) -> None:
        self.router = router
        self.fc = router.fc.weight, router.fc.bias
        self.hidden = None
        if router.routing == 'softmax_mlp':
            self.hidden = router.hidden.weight, router.hidden.bias

    def __call__(self, pooled: Tensor) -> Tensor:
        if self.hidden is not None:
            pooled = F.linear(pooled, *self.hidden).relu_()
        logits = F.linear(pooled, *self.fc)
        # It may change from epoch to epoch.
        if self.router.temperature != 1:
            logits = logits.div_(self.router.temperature)
        if self.hidden is None:
            return logits.sigmoid_()
        return logits.softmax(-1)


def check_type(part: Optional[nn.Module], *kinds: type) -> None:
    if type(part) not in kinds:
        raise Unsupported(f'{part} is none of {kinds}')


def activation_of(module: Optional[nn.Module]) -> Callable[[Tensor], Tensor]:
    if module is None:
        return _nothing
    check_type(module, *ACTIVATIONS)
    return ACTIVATIONS[type(module)]


def _nothing(x: Tensor) -> Tensor:
    return x


def _check_geometry(conv: nn.Module, kind: str) -> None:
    if isinstance(conv.padding, str) or conv.padding_mode != 'zeros':
        raise Unsupported(f'{conv} has padding of its own')
    if conv.bias is not None and conv.bias.dim() > 1:
        raise Unsupported(f'{conv} mixes its bias')
    groups = conv.groups
    if kind == 'depthwise':
        fits = groups == conv.in_channels == conv.out_channels
    elif kind == 'pointwise':
        places = *conv.kernel_size, *conv.stride, *conv.padding
        fits = groups == 1 and places == (1, 1, 1, 1, 0, 0)
    else:
        fits = groups == 1
    if not fits:
        raise Unsupported(f'{conv} is not {kind}')
