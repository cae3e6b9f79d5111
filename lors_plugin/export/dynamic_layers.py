"""Dynamic layers in operators that engines run well.

The kernels of each image in one grouped convolution over ``B C`` channels
write the number of images into the file, since the groups of a convolution
are no tensor: that form is for files whose number is fixed. Letters as in
:mod:`lors_plugin.parameternet.dynamic_conv`.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.dynamic_linear import DynamicLinear
from lors_plugin.parameternet.dynamic_swin import ImageLinear
from lors_plugin.parameternet.folding import can_fold, fold_norm
from lors_plugin.parameternet.ghost import ConvNorm


class ExportDynamicConv2d(nn.Module):
    """:class:`DynamicConv2d`, and the BatchNorm behind it if there is one.

    Where the number of images is fixed, it is a grouped convolution with the
    mixed kernels. Where it is open, a pointwise convolution is a batched
    product of the mixed kernels and the pixels, and any other applies the
    ``M`` kernels as one convolution to ``M`` copies of the input, and mixes
    the ``M`` results by one product: ``M`` times the work, but in
    ParameterNet only of the depth-wise convolutions and of the stem. ``M C``
    channels are a multiple of eight where ``C`` seldom is, which ONNX Runtime
    needs for its fast depth-wise convolution.

    Args:
        source (DynamicConv2d): With more than one expert.
        norm (nn.Module, optional): A batch norm, folded into the kernels.
            Defaults to None.
        number (int, optional): Images per batch. Defaults to None for any.
    """

    def __init__(
        self,
        source: DynamicConv2d,
        norm: Optional[nn.Module] = None,
        number: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.routing, self.number = source.routing, number
        self.geometry = (
            source.stride,
            source.padding,
            source.dilation,
            source.groups,
        )
        weight, bias = source.weight.detach(), source.bias
        shift = weight.new_zeros(source.out_channels)
        bias = None if bias is None else bias.detach()
        if norm is not None:
            dtype = weight.dtype
            weight, bias, shift = (
                None if value is None else value.to(dtype)
                for value in fold_norm(weight, bias, norm)
            )
        plain = tuple(source.kernel_size) == (1, 1)
        self.pointwise = (
            plain and source.groups == 1 and (tuple(source.padding) == (0, 0))
        )
        self.experts, self.shape = weight.shape[0], weight.shape[1:]
        # Rows of kernels to be mixed, or the kernels of one convolution.
        mixed = self.pointwise or number is not None
        weight = weight.flatten(1) if mixed else weight.flatten(0, 1)
        self.register_buffer('weight', weight)
        self.register_buffer('bias', bias)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C_out, H', W')."""
        attention = self.routing(x.mean((2, 3))).to(x.dtype)
        shift = self.shift
        if self.bias is not None:
            shift = attention @ self.bias + shift
        if self.number is not None:
            return self._grouped(x, attention, shift)
        compute = self._product if self.pointwise else self._mixture
        shift = shift.view(-1, self.shape[0], 1, 1)
        return compute(x, attention) + shift

    def _grouped(self, x: Tensor, attention: Tensor, shift: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        kernels = (attention @ self.weight).view(-1, *self.shape[1:])
        out = F.conv2d(
            x.flatten(0, 1).unsqueeze(0),
            kernels,
            shift.expand(self.number, -1).flatten(),
            stride,
            padding,
            dilation,
            groups * self.number,
        )
        return out.view(self.number, self.shape[0], *out.shape[2:])

    def _product(self, x: Tensor, attention: Tensor) -> Tensor:
        down, across = self.geometry[0]
        if (down, across) != (1, 1):
            x = x[:, :, ::down, ::across]
        kernels = attention @ self.weight
        kernels = kernels.view(-1, *self.shape[:2])
        pixels = kernels @ x.flatten(2)
        return pixels.view(x.shape[0], -1, x.shape[2], x.shape[3])

    def _mixture(self, x: Tensor, attention: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        if groups > 1:
            x = torch.cat([x] * self.experts, 1)
            groups *= self.experts
        out = F.conv2d(x, self.weight, None, stride, padding, dilation, groups)
        height, width = out.shape[2:]
        out = attention.unsqueeze(1) @ out.view(x.shape[0], self.experts, -1)
        return out.view(-1, self.shape[0], height, width)


class ExportDynamicLinear(nn.Module):
    """:class:`DynamicLinear` as a batched product.

    Args:
        source (DynamicLinear): With more than one expert.
    """

    def __init__(self, source: DynamicLinear) -> None:
        super().__init__()
        self.routing = source.routing
        self.width = source.in_features
        bias = source.bias
        self.register_buffer('weight', source.weight.detach().flatten(1))
        self.register_buffer('bias', None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, ..., C_in) to (B, ..., C_out)."""
        tokens = x if x.dim() == 3 else x.view(x.shape[0], -1, self.width)
        attention = self.routing(tokens.mean(1)).to(x.dtype)
        matrices = attention @ self.weight
        matrices = matrices.view(x.shape[0], -1, self.width)
        # Exporters know no mT.
        out = tokens @ matrices.transpose(1, 2)
        if self.bias is not None:
            out = out + (attention @ self.bias).unsqueeze(1)
        return out if x.dim() == 3 else out.view(*x.shape[:-1], -1)


class ExportImageLinear(ExportDynamicLinear):
    """:class:`ImageLinear`, which is told how many windows there are.

    Args:
        source (ImageLinear): With more than one expert.

    Attributes:
        num_windows (int | Tensor): Of each image; the attention around this
            sets it, to a tensor where a tracer looks on.
    """

    num_windows = 1

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B windows, tokens, C_in) to (B windows, tokens, C_out)."""
        tokens = x.shape[1]
        shape = -1, self.num_windows * tokens, self.width
        out = super().forward(x.reshape(shape))
        return out.reshape(-1, tokens, out.shape[-1])


def replace_dynamic(model: nn.Module, number: Optional[int] = None) -> int:
    """Replace all dynamic layers of a model in evaluation mode, in place.

    A BatchNorm right behind a dynamic convolution, in a :class:`ConvNorm` or
    a ``ConvModule`` of MMCV, becomes a part of it.

    Args:
        model (nn.Module): In evaluation mode.
        number (int, optional): Images per batch. Defaults to None for any.

    Returns:
        int: Layers that were replaced.
    """
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if getattr(layer, 'routing', None) is None:
                continue
            if isinstance(layer, ImageLinear):
                setattr(parent, name, ExportImageLinear(layer))
            elif isinstance(layer, DynamicLinear):
                setattr(parent, name, ExportDynamicLinear(layer))
            elif isinstance(layer, DynamicConv2d):
                behind = _norm_behind(parent, name)
                norm = getattr(parent, behind) if behind else None
                export = ExportDynamicConv2d(layer, norm, number)
                setattr(parent, name, export)
                if behind:
                    setattr(parent, behind, nn.Identity())
            else:
                continue
            count += 1
    return count


def _norm_behind(parent: nn.Module, name: str) -> str:
    """Name of the norm that folds into a convolution, '' for none."""
    if name != 'conv':
        return ''
    if type(parent) is ConvNorm:
        behind = 'norm'
    elif type(parent) is ConvModule and parent.with_norm:
        order = parent.order
        if order.index('norm') != order.index('conv') + 1:
            return ''
        behind = parent.norm_name
    else:
        return ''
    return behind if can_fold(getattr(parent, behind)) else ''
