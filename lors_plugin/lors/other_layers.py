"""Static LORS for convolutions and for the attention of PyTorch."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import LowRankResidualLinear


class LowRankResidualConv2d(LowRankResidualLinear):
    """A convolution whose weight, as a matrix, is ``W + B A``.

    The matrix has the shape (out, in / groups * height * width). It is formed
    for each call, for much less than what the convolution itself takes.

    Args:
        conv (nn.Conv2d): Gives the sizes, the bias, dtype and device.
        rank (int): Of the private part. 0 leaves it out.
        owner (LowRankResidualConv2d, optional): See
            :class:`LowRankResidualLinear`.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        rank: int,
        owner: Optional['LowRankResidualConv2d'] = None,
    ) -> None:
        super().__init__(
            conv.weight[0].numel(),
            conv.out_channels,
            rank,
            bias=False,
            owner=owner,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.bias = conv.bias
        self.shape = tuple(conv.weight.shape)
        names = ('stride', 'padding', 'dilation', 'groups')
        self.options = {name: getattr(conv, name) for name in names}

    @property
    def weight(self) -> Tensor:
        """Tensor: The full weight, shape (out, in / groups, height, width)."""
        return super().weight.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve features of shape (B, in, H, W)."""
        return F.conv2d(x, self.weight, self.bias, **self.options)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The plain convolution with the same result."""
        plain = nn.Conv2d(
            self.shape[1] * self.options['groups'],
            self.out_features,
            self.shape[2:],
            bias=self.bias is not None,
            device='meta',
            **self.options,
        )
        weight = self.merged_weight()
        plain.weight = nn.Parameter(
            weight.view(self.shape), weight.requires_grad
        )
        if self.bias is not None:
            plain.bias = nn.Parameter(
                self.bias.clone(), self.bias.requires_grad
            )
        return plain.train(self.training)

    def extra_repr(self) -> str:
        own = dict(shape=self.shape, rank=self.rank, **self.options)
        return ', '.join(f'{key}={value}' for key, value in own.items())


class LowRankInProjection(LowRankResidualLinear):
    """The projection of queries, keys and values of an attention.

    PyTorch's attention reads its weight and adds the bias itself.
    """

    plain_key = '_weight'


class LowRankMultiheadAttention(nn.MultiheadAttention):
    """PyTorch's attention with a joint projection of inputs that is shared.

    Args:
        attention (nn.MultiheadAttention): What it takes the place of; its
            other parts become those of this one.
        in_proj (LowRankInProjection): Instead of ``in_proj_weight``.
    """

    in_proj: nn.Module

    def __init__(
        self, attention: nn.MultiheadAttention, in_proj: LowRankInProjection
    ) -> None:
        nn.Module.__init__(self)
        _take_over(self, attention)
        del self._parameters['in_proj_weight']
        self.in_proj = in_proj

    @property
    def in_proj_weight(self) -> Tensor:
        """Tensor: The full weight, shape (3 D, D), formed when asked for."""
        return self.in_proj.weight

    @torch.no_grad()
    def merged(self) -> nn.MultiheadAttention:
        """PyTorch's attention with the same result."""
        plain = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        nn.Module.__init__(plain)
        _take_over(plain, self)
        in_proj = plain._modules.pop('in_proj')
        if isinstance(in_proj, LowRankInProjection):
            weight = in_proj.merged_weight()
        else:  # a linear layer by now
            weight = in_proj.weight
        # PyTorch's order, of which hosts that draw weights anew take notice.
        plain._parameters = {
            'in_proj_weight': weight, **plain._parameters
        }  # fmt: skip
        return plain


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module the parts, parameters and settings of another one."""
    for name, value in vars(old).items():
        own = name in ('_parameters', '_modules', '_buffers')
        new.__dict__[name] = dict(value) if own else value
