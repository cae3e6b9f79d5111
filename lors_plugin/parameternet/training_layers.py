"""Convolution, norm and activation in training on a CPU."""

from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.ops.dynamic_conv.side_by_side import Pair
from lors_plugin.ops.dynamic_conv.side_by_side_training import (
    Activation,
    depthwise,
    normalize,
    pointwise,
)

from .inference_layers import ACTIVATIONS, Layer, Parts

aten = torch.ops.aten
GRADIENTS = {
    nn.Hardswish: aten.hardswish_backward,
    nn.ReLU: lambda grad, x: aten.threshold_backward(grad, x, 0),
    nn.SiLU: aten.silu_backward,
}


class TrainingLayer(Layer):
    """A convolution, its norm and activation, with gradients."""

    def __init__(self, part: nn.Module, kind: str, index: int) -> None:
        super().__init__(part, kind, index)
        self.activation = None
        if part.act is not None:
            kind = type(part.act)
            self.activation = Activation(ACTIVATIONS[kind], GRADIENTS[kind])

    def pointwise(
        self, parts: Parts, pooled: Tensor, frame: None = None
    ) -> Tensor:
        """Parts of a map and their mean (B, C) to a map."""
        out = pointwise(parts, self._experts(), self._attention(pooled))
        return self._normalize(out)

    def depthwise(
        self,
        maps: Tensor,
        size: Pair,
        pooled: Optional[Tensor],
        frame: None = None,
        channels: Optional[slice] = None,
    ) -> tuple[Tensor, Pair]:
        """Some channels of a map, of a size, to those and the new size."""
        channels = channels or slice(None)
        experts = self._experts()[:, channels]
        attention = self._attention(pooled)
        geometry = self.built[:3]
        out, size = depthwise(maps, size, experts, attention, *geometry)
        return self._normalize(out, channels), size

    def images(
        self, images: Tensor, frame: None = None
    ) -> tuple[Tensor, Pair]:
        """Images (B, C, H, W) to a map and its size."""
        # Channels last are a smaller step from where maps lie.
        images = images.contiguous(memory_format=torch.channels_last)
        out = self.conv.forward(images).permute(2, 3, 0, 1)
        maps = out.flatten(0, 1).contiguous()
        return self._normalize(maps, biased=True), tuple(out.shape[:2])

    def _experts(self) -> Tensor:
        """Shape (M, C_out, C_in / groups, kh, kw)."""
        return self.weight if self.weight.dim() == 5 else self.weight[None]

    def _attention(self, pooled: Optional[Tensor]) -> Optional[Tensor]:
        return None if self.router is None else self.router(pooled)

    def _normalize(
        self,
        maps: Tensor,
        channels: slice = slice(None),
        biased: bool = False,
    ) -> Tensor:
        """Norm and activation of some channels, with a bias or not yet."""
        if self.bias is not None and not biased:
            maps = maps + self.bias[channels]
        mean, var, weight, bias = (v[channels] for v in self.norm_values)
        return normalize(
            maps, weight, bias, mean, var, self.norm.training,
            self._momentum(channels), self.norm.eps, self.activation,
        )  # fmt: skip

    def _momentum(self, channels: slice) -> float:
        """As ``nn.BatchNorm2d`` has it; the first channels count the batch."""
        norm = self.norm
        count = norm.num_batches_tracked
        if norm.training and count is not None and not channels.start:
            count.add_(1)
        if norm.momentum is None:
            return 1.0 / float(count) if norm.training else 0.0
        return norm.momentum
