"""Normalisations that keep float32 statistics under autocast."""

import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.utils import at_least_float32


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
