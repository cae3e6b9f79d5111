"""Normalisations that keep float32 statistics under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.utils import at_least_float32


def refuse_half(module: nn.Module) -> None:
    """Refuse a model that was cast as a whole, by ``.half()`` for example.

    Args:
        module (nn.Module): Whose first weight is looked at.

    Raises:
        TypeError: If it is float16 or bfloat16.
    """
    dtype = next(module.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f'the weights were cast to {dtype} as a whole, but boxes and '
            'normalisations compute in float32; leave the weights in float32 '
            'and use mixed precision: --amp, or torch.autocast in a script'
        )


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose input is cast to float32 first, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            at_least_float32(x),
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
        )


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose input is cast to float32 first, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(
            at_least_float32(x),
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
        )
