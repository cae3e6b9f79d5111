"""LoRA: a low-rank update beside the weight of a layer."""

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lors_plugin.utils import check_at_least, check_choice, check_number

from .adapter import Adapter, AdapterHook
from .sites import NewWeight, SiteError, check_affine, pads_by_size


class OutputHook(AdapterHook):
    """Add the update of a LoRA to the output of its layer (forward hook)."""

    def __call__(
        self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor:
        """Return the output of a call with the update."""
        x = args[0] if args else kwargs['input']
        return output + self.adapter(layer, x).to(output.dtype)


class LoRA(Adapter):
    """``W x + alpha / rank * B A drop(x)`` of a layer with the weight ``W``.

    Paper: `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, section 4.1; names and defaults as
    in PEFT. Before a convolution ``A`` is one of the same kernel, and ``B``
    is pointwise. ``B`` starts at zero, so a fresh update does nothing.

    Args:
        in_channels (int): Of the layer.
        out_channels (int): Of the layer.
        rank (int): Rows of ``A``. Defaults to 8.
        alpha (float): Defaults to 8.
        dropout (float): Of the inputs of ``A``, while training. Defaults
            to 0.
        kernel_size (Sequence[int]): Of a convolution; () for a linear layer.
        bias (bool): Whether ``B`` has a bias (PEFT: ``lora_bias``). Defaults
            to False.
    """

    method = child = 'lora'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        kernel_size: tuple = (),
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_at_least('rank', rank)
        check_number('alpha', alpha)
        check_number('dropout', dropout, 0, 1)
        check_choice('bias', bias, (False, True))
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(rank, in_channels, *kernel_size))
        self.B = nn.Parameter(torch.empty(out_channels, rank))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer('scale', torch.tensor(float(alpha) / rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As PEFT: Kaiming for ``A``, zero for all else."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def for_layer(cls, layer: nn.Module, **options: Any) -> 'LoRA':
        """Make an update of a linear layer or a convolution.

        Raises:
            SiteError: If the layer is neither, or not plain.
        """
        kind = type(layer).__name__
        if options.pop('inputs', ''):
            raise SiteError(
                'a LoRA belongs to one layer; name the projections of an '
                'attention themselves'
            )
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise SiteError(
                f'{kind} is no linear layer or convolution, whose output a '
                'LoRA could add to; name those inside of it that are called, '
                "or use method='rep_adapter', which adapts attentions too"
            )
        check_affine(layer)
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features, **options)
        if layer.groups != 1:
            raise SiteError(
                f'a convolution with groups={layer.groups} would become '
                'dense; adapt the pointwise layer behind it instead'
            )
        if pads_by_size(layer) and max(layer.kernel_size) > 1:
            raise SiteError(
                f'{kind} pads its input itself, before its update could see '
                'it; adapt the pointwise layer behind it instead'
            )
        return cls(
            layer.in_channels,
            layer.out_channels,
            kernel_size=tuple(layer.kernel_size),
            **options,
        )

    @classmethod
    def from_state(
        cls,
        layer: nn.Module,
        state: dict[str, Tensor],
        scale: Optional[float] = None,
    ) -> 'LoRA':
        """See the base class."""
        rank = len(state['A'])
        return cls.for_layer(
            layer,
            rank=rank,
            alpha=float(state['scale']) * rank,
            bias='bias' in state,
        )

    def options(self) -> dict[str, Any]:
        """Arguments that build such an adapter."""
        rank, channels, *kernel = self.A.shape
        return dict(
            type=self.method,
            in_channels=channels,
            out_channels=len(self.B),
            rank=rank,
            alpha=self.scale.item() * rank,
            dropout=self.dropout,
            kernel_size=list(kernel),
            bias=self.bias is not None,
        )

    def check(self, layer: nn.Module) -> None:
        """See the base class."""
        with torch.device('meta'):
            other = self.for_layer(
                layer, rank=len(self.A), bias=self.bias is not None
            )
        if other.signature() != self.signature():
            raise SiteError(
                f'its weight is {tuple(layer.weight.shape)}, its adapter '
                f'takes {self.A.shape[1]} channels to {len(self.B)}'
            )

    def register(
        self, layer: nn.Module, by: Optional[Callable] = None
    ) -> list[RemovableHandle]:
        """See the base class."""
        hook = OutputHook(by or self)
        return [layer.register_forward_hook(hook, with_kwargs=True)]

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Compute the update of a layer's output.

        Args:
            layer (nn.Module): Its stride and padding count.
            x (Tensor): Input of the layer.

        Returns:
            Tensor: Of the shape of the layer's output.
        """
        x = F.dropout(x, self.dropout, self.training)
        if isinstance(layer, nn.Conv2d):
            hidden = layer._conv_forward(x, self.A, None)
            delta = F.conv2d(hidden, self.B[..., None, None], self.bias)
        else:
            delta = F.linear(F.linear(x, self.A), self.B, self.bias)
        return delta * self.scale

    @torch.no_grad()
    def merged_weights(self, layer: nn.Module) -> list[NewWeight]:
        """See the base class."""
        delta = torch.tensordot(self.B.double(), self.A.double(), 1)
        scale = self.scale.double()
        weight = layer.weight.double() + scale * delta
        new = [(layer, 'weight', weight)]
        if self.bias is not None:
            shift = scale * self.bias.double()
            if layer.bias is not None:
                shift = layer.bias.double() + shift
            new.append((layer, 'bias', shift))
        return new

    @property
    def first_trained(self) -> nn.Parameter:
        """See the base class."""
        return self.B

    def extra_repr(self) -> str:
        """Return sizes and scale."""
        rank, channels = self.A.shape[:2]
        scale = 'unknown' if self.scale.is_meta else f'{self.scale.item():g}'
        return f'{channels} -> {rank} -> {len(self.B)}, scale={scale}'
