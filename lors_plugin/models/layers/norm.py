"""Normalisations that keep float32 statistics under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half-precision tensors up; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
