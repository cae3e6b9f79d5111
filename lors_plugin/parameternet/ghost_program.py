"""GhostNet-like backbones on a CPU, as short programs.

Modules cost what they do not compute: each call of a small layer costs
Python more than its arithmetic, norms and activations read maps again that
have left the cache, and every kernel is mixed into fresh memory. A program
does the same as the modules, with the images side by side
(:mod:`lors_plugin.ops.dynamic_conv.side_by_side`), in which order depth-wise
convolutions and norms are faster, in both directions:

- the halves of a Ghost module are joined where they are added only;
- a mean that two layers need is taken once;
- in inference, scales and shifts of all norms are computed at once and are a
  part of the convolution before them, and kernels are mixed into memory that
  all layers share;
- in training, mixed kernels and normalised maps are computed again instead
  of kept.

Nothing of the weights is kept from one call to the next, so nothing goes
stale. Shapes: ``B`` images, ``L`` places, ``C`` channels.
"""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.ops.backend import keep_memory
from lors_plugin.ops.dynamic_conv import chooses_reference
from lors_plugin.ops.dynamic_conv.side_by_side import Pair, mean, to_images

from .dynamic_conv import DynamicConv2d
from .ghost import ConvNorm, GhostBottleneck, GhostModule, SqueezeExcite
from .inference_layers import (
    ACTIVATIONS,
    Frame,
    Layer,
    Parts,
    Unsupported,
    activation_of,
    check_type,
)
from .routing import ExpertRouter
from .training_layers import TrainingLayer
from .watching import Snapshot

# A forward that somebody replaced is not stepped over.
_FORWARDS = {
    kind: kind.forward
    for kind in (
        *ACTIVATIONS, ConvNorm, DynamicConv2d, ExpertRouter, GhostBottleneck,
        GhostModule, SqueezeExcite, nn.BatchNorm2d, nn.Conv2d, nn.Linear,
    )
}  # fmt: skip


class GhostProgram:
    """What a backbone computes, without calling its modules.

    Args:
        net (nn.Module): With ``stem``, a :class:`ConvNorm`, and ``stages``,
            each of :class:`GhostBottleneck` or pointwise :class:`ConvNorm`.

    Attributes:
        unsupported (str, optional): Which part is another one; then
            the program cannot run.
    """

    layer_type: type[Layer]

    def __init__(self, net: nn.Module) -> None:
        keep_memory()
        self._snapshot = Snapshot(net)
        self._layers: list[Layer] = []
        self.unsupported = None
        try:
            self._stem = self._layer(net.stem, 'images')
            self._stages = [
                [self._block(block) for block in stage] for stage in net.stages
            ]
            if len({layer.norm.eps for layer in self._layers}) > 1:
                raise Unsupported('norms with several eps')
        except Unsupported as reason:
            self.unsupported = str(reason)

    def is_current(self) -> bool:
        """Whether the network still has the parts that it had."""
        return self._snapshot.is_current()

    def can_run(self, x: Tensor) -> bool:
        """Whether the program does with images what the modules would.

        Args:
            x (Tensor): Images, on a CPU, that nobody watches.
        """
        return (
            self.unsupported is None
            and not self._snapshot.is_watched()
            and self._snapshot.has_type(x.dtype)
            and all(kind.forward is own for kind, own in _FORWARDS.items())
            and all([layer.is_as_built() for layer in self._layers])
            and not any(map(chooses_reference, self._backends()))
        )

    def _backends(self) -> set[str]:
        """What the dynamic layers were told to compute with."""
        return {
            layer.conv.backend
            for layer in self._layers
            if layer.router is not None
        }

    def _run(
        self,
        images: Tensor,
        out_indices: Sequence[int],
        frame: Optional[Frame] = None,
        with_cp: bool = False,
    ) -> tuple[Tensor, ...]:
        maps, size = self._stem.images(images, frame)
        outs = {}
        for i, stage in enumerate(self._stages):
            for block in stage:
                if with_cp and maps.requires_grad:
                    maps, size = checkpoint(
                        block, maps, size, frame, use_reentrant=False
                    )
                else:
                    maps, size = block(maps, size, frame)
            if i in out_indices:
                outs[i] = to_images(maps, size)
        return tuple(outs[i] for i in out_indices)

    def _layer(self, part: nn.Module, kind: str) -> Layer:
        layer = self.layer_type(part, kind, len(self._layers))
        self._layers.append(layer)
        return layer

    def _ghost(self, part: nn.Module) -> '_Ghost':
        check_type(part, GhostModule)
        return _Ghost(
            self._layer(part.primary, 'pointwise'),
            self._layer(part.cheap, 'depthwise'),
            part.out_channels,
        )

    def _block(self, part: nn.Module) -> Callable:
        if type(part) is ConvNorm:
            return _Pointwise(self._layer(part, 'pointwise'))
        check_type(part, GhostBottleneck)
        down = shortcut = None
        if part.depthwise is not None:
            down = self._layer(part.depthwise, 'depthwise')
        if part.shortcut is not None:
            spread, widen = part.shortcut
            shortcut = (
                self._layer(spread, 'depthwise'),
                self._layer(widen, 'pointwise'),
            )
        return _Block(
            self._ghost(part.expand),
            down,
            None if part.se is None else _Excite(part.se),
            self._ghost(part.project),
            shortcut,
        )


class GhostInference(GhostProgram):
    """Evaluation without gradients."""

    layer_type = Layer

    def can_run(self, x: Tensor) -> bool:
        """As the program; and no norm takes its statistics from the maps."""
        return super().can_run(x) and not any(
            layer.norm.training for layer in self._layers
        )

    def __call__(
        self, x: Tensor, out_indices: Sequence[int], piece: int
    ) -> tuple[Tensor, ...]:
        """Compute the outputs of stages.

        Args:
            x (Tensor): Images, shape (B, C, H, W).
            out_indices (Sequence[int]): Which stages.
            piece (int): Images to compute at once.

        Returns:
            tuple[Tensor]: Contiguous, shape (B, C_i, H_i, W_i) each.
        """
        frame = Frame(self._layers, x, min(piece, len(x)))
        outs = [self._run(part, out_indices, frame) for part in x.split(piece)]
        if len(outs) == 1:
            return outs[0]
        return tuple(torch.cat(parts) for parts in zip(*outs))


class GhostTraining(GhostProgram):
    """With gradients, and norms that train or do not."""

    layer_type = TrainingLayer

    def __call__(
        self, x: Tensor, out_indices: Sequence[int], with_cp: bool
    ) -> tuple[Tensor, ...]:
        """Compute the outputs of stages.

        Args:
            x (Tensor): Images, shape (B, C, H, W).
            out_indices (Sequence[int]): Which stages.
            with_cp (bool): Compute blocks again in the backward pass.

        Returns:
            tuple[Tensor]: Contiguous, shape (B, C_i, H_i, W_i) each.
        """
        return self._run(x, out_indices, with_cp=with_cp)


class _Ghost:
    """Half of the channels, then the others from those."""

    def __init__(self, primary: Layer, cheap: Layer, channels: int) -> None:
        self.primary, self.cheap = primary, cheap
        self.rest = channels - primary.norm.num_features

    def __call__(
        self, parts: Parts, pooled: Tensor, size: Pair, frame: Optional[Frame]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Both halves, and the mean of the first."""
        first = self.primary.pointwise(parts, pooled, frame)
        half = mean(first)
        second, _ = self.cheap.depthwise(first, size, half, frame)
        if self.rest < second.shape[2]:
            second = second[..., : self.rest].contiguous()
        return (first, second), half


class _Excite:
    """:class:`SqueezeExcite` on a map in parts."""

    def __init__(self, part: nn.Module) -> None:
        check_type(part, SqueezeExcite)
        self.convs = part.reduce, part.expand
        for conv in self.convs:
            check_type(conv, nn.Conv2d)
        self.act = activation_of(part.act)

    def __call__(self, parts: Parts, pooled: Tensor) -> tuple[Parts, Tensor]:
        """Scaled parts, in their memory if nobody needs it, and their mean."""
        reduce, expand = (
            (conv.weight.flatten(1), conv.bias) for conv in self.convs
        )
        hidden = self.act(F.linear(pooled, *reduce))
        gates = F.hardsigmoid(F.linear(hidden, *expand))
        widths = [part.shape[2] for part in parts]
        keep = torch.is_grad_enabled()
        parts = [
            part * gate if keep else part.mul_(gate)
            for part, gate in zip(parts, gates.split(widths, 1))
        ]
        return parts, gates * pooled


class _Pointwise:
    """A last :class:`ConvNorm`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(
        self, maps: Tensor, size: Pair, frame: Optional[Frame]
    ) -> tuple[Tensor, Pair]:
        return self.layer.pointwise([maps], mean(maps), frame), size


class _Block:
    """:class:`GhostBottleneck`."""

    def __init__(
        self,
        expand: _Ghost,
        down: Optional[Layer],
        excite: Optional[_Excite],
        project: _Ghost,
        shortcut: Optional[tuple[Layer, Layer]],
    ) -> None:
        self.expand, self.down, self.excite = expand, down, excite
        self.project, self.shortcut = project, shortcut

    def __call__(
        self, maps: Tensor, size: Pair, frame: Optional[Frame]
    ) -> tuple[Tensor, Pair]:
        pooled, before = mean(maps), size
        parts, first = self.expand([maps], pooled, size, frame)
        if self.down is not None:
            parts, size = self._go_down(parts, size, frame)
            first = mean(parts[0])
        means = torch.cat([first, mean(parts[1])], 1)
        if self.excite is not None:
            parts, means = self.excite(parts, means)
        halves, _ = self.project(parts, means, size, frame)
        if self.shortcut is not None:
            spread, widen = self.shortcut
            maps, _ = spread.depthwise(maps, before, pooled, frame)
            maps = widen.pointwise([maps], mean(maps), frame)
        return torch.cat(halves, 2).add_(maps), size

    def _go_down(
        self, parts: Parts, size: Pair, frame: Optional[Frame]
    ) -> tuple[list[Tensor], Pair]:
        outs, start = [], 0
        for part in parts:
            channels = slice(start, start + part.shape[2])
            out = self.down.depthwise(part, size, None, frame, channels)
            outs.append(out)
            start = channels.stop
        return [out for out, _ in outs], outs[0][1]
