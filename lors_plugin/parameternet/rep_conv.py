"""A convolution with parallel branches that vanish at inference."""

from collections.abc import Sequence
from typing import Optional, Union

import torch
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_divisible

from .dynamic_conv import pair
from .folding import build_norm, can_fold, fold_norm

DEFAULT_NORM = dict(type='BN')


class _Branch(BaseModule):
    """A convolution and its normalisation, if any."""

    def __init__(self, conv: nn.Conv2d, norm_cfg: Optional[dict]) -> None:
        super().__init__()
        self.conv = conv
        self.norm = None
        if norm_cfg is not None:
            self.norm = build_norm(norm_cfg, conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def kernel_and_offset(self) -> tuple[Tensor, Tensor]:
        """Of the one convolution that does the same, in float64."""
        kernel, bias = self.conv.weight.double(), self.conv.bias
        if self.norm is not None:
            kernel, bias, shift = fold_norm(kernel, bias, self.norm)
            return kernel, shift if bias is None else bias + shift
        if bias is None:
            return kernel, kernel.new_zeros(len(kernel))
        return kernel, bias.double()


@MODELS.register_module()
class RepConv2d(BaseModule):
    """A plain convolution and ``n`` branches beside it, summed.

    The alternative that ParameterNet (`arXiv 2306.14525
    <https://arxiv.org/abs/2306.14525>`_) compares with: more parameters while
    training, none at inference, where :meth:`merged` makes one convolution of
    all. Each branch has the geometry of the plain convolution and a batch
    normalisation of its own, since a mere sum of convolutions would learn as
    one with a larger step. The plain one has none: it keeps its scale, and
    what follows in a network normalises the sum.

    Args:
        in_channels (int): Channels ``C_in``.
        out_channels (int): Channels ``C_out``.
        kernel_size (int | Sequence[int]): One value or (y, x).
        stride (int | Sequence[int]): Defaults to 1.
        padding (int | Sequence[int]): Of zeros. Defaults to 0.
        dilation (int | Sequence[int]): Defaults to 1.
        groups (int): Defaults to 1.
        bias (bool): Of the plain convolution. Defaults to False.
        num_branches (int): ``n``. Defaults to 3.
        norm_cfg (dict, optional): Of the branches, a batch normalisation;
            None for a mere sum. Defaults to dict(type='BN').
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    # What hosts ask of any convolution.
    transposed = False
    output_padding = (0, 0)
    padding_mode = 'zeros'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, Sequence[int]],
        stride: Union[int, Sequence[int]] = 1,
        padding: Union[int, Sequence[int]] = 0,
        dilation: Union[int, Sequence[int]] = 1,
        groups: int = 1,
        bias: bool = False,
        num_branches: int = 3,
        norm_cfg: Optional[dict] = DEFAULT_NORM,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least('num_branches', num_branches, 0)
        check_at_least('in_channels', in_channels, 1)
        check_at_least('out_channels', out_channels, 1)
        check_at_least('groups', groups, 1)
        check_divisible('in_channels', in_channels, 'groups', groups)
        check_divisible('out_channels', out_channels, 'groups', groups)
        kernel_size = pair('kernel_size', kernel_size, 1)
        stride = pair('stride', stride, 1)
        padding = pair('padding', padding, 0)
        dilation = pair('dilation', dilation, 1)

        def make(bias: bool) -> nn.Conv2d:
            return nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
            )

        self.conv = make(bias)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self.conv.kernel_size
        self.stride = self.conv.stride
        self.padding = self.conv.padding
        self.dilation = self.conv.dilation
        self.groups = groups
        self.branches = ModuleList(
            _Branch(make(False), norm_cfg) for _ in range(num_branches)
        )
        for branch in self.branches:
            norm = branch.norm
            if norm is not None and not can_fold(norm):
                raise ValueError(
                    f'norm_cfg={norm_cfg} cannot be merged into a '
                    'convolution; give a batch normalisation with running '
                    'statistics, or None'
                )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all convolutions.

        Args:
            x (Tensor): Shape (B, C_in, H, W).

        Returns:
            Tensor: Shape (B, C_out, H_out, W_out).
        """
        out = self.conv(x)
        for branch in self.branches:
            out = out + branch(x)
        return out

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The convolution that does the same in evaluation mode.

        Returns:
            nn.Conv2d: New, computed in float64 and of the type, device and
            mode of this module, which stays as it is.
        """
        conv = self.conv
        pairs = [branch.kernel_and_offset() for branch in self.branches]
        kernel = sum((pair[0] for pair in pairs), conv.weight.double())
        offset = sum(pair[1] for pair in pairs)
        has_offset = any(branch.norm is not None for branch in self.branches)
        bias = conv.bias
        if bias is not None:
            offset = offset + bias.double()
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=bias is not None or has_offset,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        new.weight.copy_(kernel)
        new.weight.requires_grad_(conv.weight.requires_grad)
        if new.bias is not None:
            new.bias.copy_(offset)
            new.bias.requires_grad_(conv.weight.requires_grad)
        return new.train(self.training)
