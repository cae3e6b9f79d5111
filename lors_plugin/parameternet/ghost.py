"""Parts of GhostNet, with any kind of convolution.

Shapes: ``B`` images, ``C`` channels.
"""

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from lors_plugin.utils import build_part

from .folding import build_norm

DIVISOR = 4
# (in_channels, out_channels, kernel_size, stride, groups) -> convolution
ConvFactory = Callable[[int, int, int, int, int], nn.Module]


def make_divisible(value: float, divisor: int = DIVISOR) -> int:
    """The nearest multiple that is not more than a tenth smaller.

    Args:
        value (float): A number of channels, scaled by a width.
        divisor (int): Defaults to 4.

    Returns:
        int: At least ``divisor``.
    """
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


class ConvNorm(BaseModule):
    """Convolution, normalisation and an activation or none.

    Args:
        conv (nn.Module): Makes ``C_out`` channels.
        channels (int): ``C_out``.
        norm_cfg (dict): Of the normalisation.
        act_cfg (dict, optional): Of the activation. Defaults to None.
    """

    def __init__(
        self,
        conv: nn.Module,
        channels: int,
        norm_cfg: dict,
        act_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = build_norm(norm_cfg, channels)
        self.act = None
        if act_cfg is not None:
            self.act = build_part('act_cfg', build_activation_layer, act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C_out, H', W')."""
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class SqueezeExcite(BaseModule):
    """Scale the channels of an image by what its mean says.

    Args:
        channels (int): ``C``.
        ratio (float): Hidden channels a channel.
        act_cfg (dict): Of the hidden ones.
    """

    def __init__(self, channels: int, ratio: float, act_cfg: dict) -> None:
        super().__init__()
        hidden = make_divisible(channels * ratio)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = build_activation_layer(act_cfg)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W), in and out."""
        scale = self.reduce(x.mean((2, 3), keepdim=True))
        return x * F.hardsigmoid(self.expand(self.act(scale)))


class GhostModule(BaseModule):
    """Half of the channels by a pointwise convolution, half from those.

    GhostNet, `arXiv 1911.11907 <https://arxiv.org/abs/1911.11907>`_, section
    3.1: a cheap depth-wise convolution makes the second half.

    Args:
        in_channels (int): ``C_in``.
        out_channels (int): ``C_out``.
        make_conv (ConvFactory): Makes both convolutions.
        norm_cfg (dict): Of the normalisations.
        act_cfg (dict, optional): None for no activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        make_conv: ConvFactory,
        norm_cfg: dict,
        act_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        half = -(-out_channels // 2)
        self.primary = ConvNorm(
            make_conv(in_channels, half, 1, 1, 1), half, norm_cfg, act_cfg
        )
        self.cheap = ConvNorm(
            make_conv(half, half, 3, 1, half), half, norm_cfg, act_cfg
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C_out, H, W)."""
        first = self.primary(x)
        both = torch.cat([first, self.cheap(first)], 1)
        # An odd number of channels leaves one over.
        return both[:, : self.out_channels]


class GhostBottleneck(BaseModule):
    """Expand, go down where there is a stride, excite, project, add.

    Args:
        in_channels (int): ``C_in``.
        mid_channels (int): Channels between both Ghost modules.
        out_channels (int): ``C_out``.
        kernel_size (int): Of the depth-wise convolutions.
        stride (int): 1 or 2.
        se_ratio (float): Of :class:`SqueezeExcite`, 0 for none.
        make_conv (ConvFactory): Makes the convolutions of the Ghost modules
            and of the shortcut; the depth-wise one with a stride is plain.
        norm_cfg (dict): Of the normalisations.
        act_cfg (dict): Of the activations.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        se_ratio: float,
        make_conv: ConvFactory,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        self.expand = GhostModule(
            in_channels, mid_channels, make_conv, norm_cfg, act_cfg
        )
        self.depthwise = None
        if stride > 1:
            conv = plain_conv(
                mid_channels, mid_channels, kernel_size, stride, mid_channels
            )
            self.depthwise = ConvNorm(conv, mid_channels, norm_cfg)
        self.se = None
        if se_ratio:
            self.se = SqueezeExcite(mid_channels, se_ratio, act_cfg)
        self.project = GhostModule(
            mid_channels, out_channels, make_conv, norm_cfg
        )
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            down = make_conv(
                in_channels, in_channels, kernel_size, stride, in_channels
            )
            widen = make_conv(in_channels, out_channels, 1, 1, 1)
            self.shortcut = Sequential(
                ConvNorm(down, in_channels, norm_cfg),
                ConvNorm(widen, out_channels, norm_cfg),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        out = self.expand(x)
        if self.depthwise is not None:
            out = self.depthwise(out)
        if self.se is not None:
            out = self.se(out)
        out = self.project(out)
        return out + (x if self.shortcut is None else self.shortcut(x))


def plain_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    groups: int,
) -> nn.Conv2d:
    """A convolution without bias that keeps the size up to its stride."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        kernel_size // 2,
        groups=groups,
        bias=False,
    )
