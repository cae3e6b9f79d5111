"""Ghost blocks converted for inference on CPUs.

:func:`convert` replaces a block by one that computes the same in evaluation
mode, in less time; ``lors_plugin.reparam.reparameterize`` calls it:

- batch norms are folded into the experts before them, once;
- maps are in HWNC layout: shape (B, C, H, W), memory (H, W, B, C). A
  depth-wise convolution with its own kernel for each image is then a single
  convolution in channels-last layout, which a CPU library runs without
  copies, and a pointwise one is a batched product with strides. With one
  image this is channels last;
- the halves of a Ghost module stay apart until the end of the block, where
  the next pointwise convolution adds two products;
- the mean that two routers need is computed once.

Inside a block maps are contiguous tensors of shape (H, W, B, C): ``B`` images,
``C`` channels.
"""

import copy
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.ops.backend import keep_memory

from .dynamic_conv import DynamicConv2d
from .folding import can_fold, fold_norm
from .ghost import ConvNorm, GhostBottleneck, GhostModule, SqueezeExcite
from .rep_conv import RepConv2d

# Eight images of 224 x 224: their maps stay below the 32 MB that glibc maps
# anew for each allocation.
CHUNK_PIXELS = 8 * 224**2


def can_convert(module: nn.Module) -> bool:
    """Return whether :func:`convert` supports a block.

    Args:
        module (nn.Module): Convolutions with branches in it count as merged.
    """
    if type(module) is ConvNorm:
        return _can_fold(module)
    if type(module) is not GhostBottleneck:
        return False
    parts = [module.expand, module.project]
    if not all(type(part) is GhostModule for part in parts):
        return False
    pointwise = [part.primary for part in parts]
    depthwise = [part.cheap for part in parts]
    if module.depthwise is not None:
        depthwise.append(module.depthwise)
    if module.shortcut is not None:
        depthwise.append(module.shortcut[0])
        pointwise.append(module.shortcut[1])
    return (
        all(map(_can_fold, (*pointwise, *depthwise)))
        and all(_is_pointwise(part.conv) for part in pointwise)
        and all(_is_depthwise(part.conv) for part in depthwise)
        and (module.se is None or _can_excite(module.se))
    )


def convert(module: nn.Module) -> nn.Module:
    """Convert a block.

    Args:
        module (nn.Module): One that :func:`can_convert`, branches merged. It
            stays as it is.

    Returns:
        nn.Module: Of the type of its weights, folded in float64. It takes
        and returns maps (B, C, H, W) of any strides.
    """
    keep_memory()
    kind = CPUConvNorm if type(module) is ConvNorm else CPUGhostBottleneck
    return kind(module).requires_grad_(False)


def is_converted(module: nn.Module) -> bool:
    """Return whether a module is a block that :func:`convert` made."""
    return isinstance(module, _InferenceBlock)


def run_in_chunks(
    network: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor
) -> tuple[Tensor, ...]:
    """Run a converted network on as many images at a time as caches like.

    Args:
        network (Callable): From images to maps.
        images (Tensor): Shape (B, C, H, W).

    Returns:
        tuple[Tensor]: Maps of all images, contiguous.
    """
    if not len(images):  # as of one image, without it
        one = images.new_zeros(1, *images.shape[1:])
        return tuple(maps[:0] for maps in network(one))
    step = len(images)
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        pixels = images.shape[2] * images.shape[3]
        step = max(CHUNK_PIXELS // max(pixels, 1), 1)
    outs = [network(part) for part in images.split(step)]
    return tuple(torch.cat(maps).contiguous() for maps in zip(*outs))


class _InferenceBlock(nn.Module):
    """A block that refuses to train."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> '_InferenceBlock':
        """Refuse training mode."""
        if mode:
            self._refuse('training mode')
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C_out, H', W'), in HWNC layout."""
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse('gradients')
        with torch.no_grad():
            return self._compute(x)

    def _refuse(self, what: str) -> None:
        raise RuntimeError(
            f'{type(self).__name__} was converted for inference and has no '
            f'{what}: take lors_plugin.reparam.unmerge(model), or build the '
            'model without deploy=True'
        )


class CPUConvNorm(_InferenceBlock):
    """:class:`ConvNorm`, folded.

    Args:
        source (ConvNorm): What is converted.
        channels (slice): Which output channels. Defaults to all.
    """

    def __init__(
        self, source: nn.Module, channels: slice = slice(None)
    ) -> None:
        super().__init__()
        conv = source.conv
        experts, bias = conv.weight, conv.bias
        weight, bias, shift = fold_norm(experts, bias, source.norm)
        self.routing = copy.deepcopy(getattr(conv, 'routing', None))
        if self.routing is None and bias is not None:
            shift, bias = shift + bias.view(-1), None
        if weight.dim() == 4:  # a plain convolution
            weight = weight[None]
        weight, shift = weight[:, channels], shift[channels]
        self.geometry = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups
        # By the names that convolutions have.
        self.in_channels = conv.in_channels
        self.kernel_size = conv.kernel_size
        self.kernel_shape = tuple(weight.shape[1:])
        self.is_pointwise = _is_pointwise(conv)
        # A matrix: mixing is a product with it.
        self.weight = nn.Parameter(weight.flatten(1).to(experts.dtype))
        self.shift = nn.Parameter(shift.to(experts.dtype))
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias[:, channels].to(experts.dtype))
        self.act = copy.deepcopy(source.act)
        if hasattr(self.act, 'inplace'):
            self.act.inplace = True

    def _compute(self, x: Tensor) -> Tensor:
        if self.is_pointwise:
            maps = _to_maps(x)
            return _to_images(self.pointwise([maps], _mean(maps)))
        kernels, shift = self.mix(x.mean((2, 3)))
        kernels = kernels.view(-1, *self.kernel_shape)
        # Libraries write channels last where maps have them, without a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        outs = [
            F.conv2d(images, kernel, None, *self.geometry, self.groups)
            for images, kernel in zip(x.chunk(len(kernels)), kernels)
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return _to_images(self._finish(_to_maps(out).add_(shift)))

    def pointwise(self, parts: list[Tensor], pooled: Tensor) -> Tensor:
        """Convolve a map that comes in parts.

        Args:
            parts (list[Tensor]): Shapes (H, W, B, C_i), together ``C_in``.
            pooled (Tensor): Their mean, shape (B, C_in).

        Returns:
            Tensor: Shape (H, W, B, C_out).
        """
        kernels, shift = self.mix(pooled)
        kernels = kernels.view(-1, *self.kernel_shape[:2])
        # One matrix for each kernel, of all positions.
        parts_of = [
            part.view(-1, len(kernels), part.shape[3]).unbind(1)
            for part in parts
        ]
        shifts = shift if shift.dim() == 2 else [shift] * len(kernels)
        outs = []
        for kernel, shift, first, *second in zip(kernels, shifts, *parts_of):
            width = first.shape[1]
            out = F.linear(first, kernel[:, :width], shift)
            if second:
                out.addmm_(second[0], kernel[:, width:].t())
            outs.append(self._finish(out))
        out = outs[0] if len(outs) == 1 else torch.stack(outs, 1)
        return out.view(*parts[0].shape[:3], -1)

    def depthwise(self, maps: Tensor, pooled: Optional[Tensor]) -> Tensor:
        """Convolve each channel.

        Args:
            maps (Tensor): Shape (H, W, B, C).
            pooled (Tensor, optional): Their mean, shape (B, C).

        Returns:
            Tensor: Shape (H', W', B, C).
        """
        kernels, shift = self.mix(pooled)
        height, width, batch, channels = maps.shape
        if batch > 1:
            kernels = kernels.expand(batch, -1)
            shift = shift.expand(batch, -1)
        out = F.conv2d(
            maps.view(1, height, width, -1).permute(0, 3, 1, 2),
            kernels.reshape(-1, *self.kernel_shape[1:]),
            shift.flatten(),
            *self.geometry,
            batch * channels,
        )
        size = out.shape[2:]
        out = out.permute(0, 2, 3, 1).reshape(*size, batch, channels)
        return self._finish(out)

    def mix(self, pooled: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Mix kernels and shift.

        Args:
            pooled (Tensor, optional): Mean of the map, shape (B, C_in).

        Returns:
            tuple[Tensor, Tensor]: Kernels as rows of a matrix and shift
            (B, C_out), or a single row and (C_out,) for all images.
        """
        # Each is looked up once: that of a module takes a microsecond.
        routing, weight, shift = self.routing, self.weight, self.shift
        if routing is None:
            return weight, shift
        attention = routing(pooled).to(weight.dtype)
        kernels = attention.mm(weight)
        if self.bias is None:
            return kernels, shift
        return kernels, shift + attention.mm(self.bias)

    def _finish(self, maps: Tensor) -> Tensor:
        act = self.act
        return maps if act is None else act(maps)


class CPUGhostModule(nn.Module):
    """:class:`GhostModule` whose halves stay apart.

    Args:
        source (GhostModule): What is converted.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.primary = CPUConvNorm(source.primary)
        self.cheap = CPUConvNorm(source.cheap)
        self.rest = source.out_channels - len(self.primary.shift)

    def forward(
        self, parts: list[Tensor], pooled: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Both halves, and the mean of the first."""
        first = self.primary.pointwise(parts, pooled)
        half = _mean(first)
        second = self.cheap.depthwise(first, half)
        if self.rest < second.shape[3]:  # an odd number of channels
            second = second[..., : self.rest].contiguous()
        return [first, second], half


class CPUGhostBottleneck(_InferenceBlock):
    """:class:`GhostBottleneck`, folded.

    Args:
        source (GhostBottleneck): What is converted.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.expand = CPUGhostModule(source.expand)
        self.depthwise = self.se = self.shortcut = None
        if source.depthwise is not None:
            half = len(self.expand.primary.shift)
            halves = slice(half), slice(half, None)
            self.depthwise = nn.ModuleList(
                CPUConvNorm(source.depthwise, channels) for channels in halves
            )
        if source.se is not None:
            self.se = nn.Sequential(
                _to_linear(source.se.reduce),
                copy.deepcopy(source.se.act),
                _to_linear(source.se.expand),
                nn.Hardsigmoid(),
            )
        self.project = CPUGhostModule(source.project)
        if source.shortcut is not None:
            self.shortcut = nn.ModuleList(map(CPUConvNorm, source.shortcut))

    def _compute(self, x: Tensor) -> Tensor:
        maps = _to_maps(x)
        pooled = _mean(maps)
        parts, mean = self.expand([maps], pooled)
        if self.depthwise is not None:
            parts = [
                down.depthwise(part, None)
                for down, part in zip(self.depthwise, parts)
            ]
            mean = _mean(parts[0])
        means = torch.cat([mean, _mean(parts[1])], 1)
        if self.se is not None:
            gates = self.se(means)
            widths = [part.shape[3] for part in parts]
            for part, gate in zip(parts, gates.split(widths, 1)):
                part.mul_(gate)
            means = means * gates
        halves, _ = self.project(parts, means)
        if self.shortcut is not None:
            down, widen = self.shortcut
            maps = down.depthwise(maps, pooled)
            maps = widen.pointwise([maps], _mean(maps))
        return _to_images(torch.cat(halves, 3).add_(maps))


def _mean(maps: Tensor) -> Tensor:
    """Mean of each channel of each image, (H, W, B, C) to (B, C)."""
    return maps.mean((0, 1))


def _to_maps(x: Tensor) -> Tensor:
    """Shape (B, C, H, W) to (H, W, B, C); a view of maps in HWNC layout."""
    return x.permute(2, 3, 0, 1).contiguous()


def _to_images(maps: Tensor) -> Tensor:
    """Shape (H, W, B, C) to (B, C, H, W), in HWNC layout."""
    return maps.permute(2, 3, 0, 1)


def _to_linear(conv: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution as a layer of vectors."""
    linear = nn.Linear(1, 1, bias=conv.bias is not None)
    linear.in_features, linear.out_features = (
        conv.in_channels,
        conv.out_channels,
    )
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach().clone())
    return linear


def _can_fold(module: nn.Module) -> bool:
    if type(module) is not ConvNorm or not can_fold(module.norm):
        return False
    conv = module.conv
    kinds = nn.Conv2d, DynamicConv2d, RepConv2d
    return (
        type(conv) in kinds
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
    )


def _can_excite(se: nn.Module) -> bool:
    convs = getattr(se, 'reduce', None), getattr(se, 'expand', None)
    return type(se) is SqueezeExcite and all(
        type(conv) is nn.Conv2d for conv in convs
    )


def _is_pointwise(conv: nn.Module) -> bool:
    return (
        conv.groups == max(conv.kernel_size) == max(conv.stride) == 1
        and max(conv.padding) == 0
    )


def _is_depthwise(conv: nn.Module) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels
