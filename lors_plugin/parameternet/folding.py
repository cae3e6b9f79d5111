"""Normalisations, and folding them into the convolution in front."""

from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from lors_plugin.utils import build_part


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """Build a normalisation; errors name the option.

    Args:
        norm_cfg (dict): As for MMCV.
        channels (int): Number of channels.

    Returns:
        nn.Module: The layer.
    """

    def build(cfg: dict) -> nn.Module:
        return build_norm_layer(cfg, channels)[1]

    return build_part('norm_cfg', build, norm_cfg)


def can_fold(norm: Optional[nn.Module]) -> bool:
    """Return whether a layer is a batch norm with running statistics."""
    kinds = nn.BatchNorm2d, nn.SyncBatchNorm
    return isinstance(norm, kinds) and norm.running_var is not None


@torch.no_grad()
def fold_norm(
    weight: Tensor, bias: Optional[Tensor], norm: nn.Module
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """Fold a batch normalisation in evaluation mode, in float64.

    Args:
        weight (Tensor): One kernel or several experts, shape (..., C_out,
            C_in / groups, kh, kw).
        bias (Tensor, optional): Shape (..., C_out).
        norm (nn.Module): One that :func:`can_fold`.

    Returns:
        tuple[Tensor, Tensor | None, Tensor]: Weight and bias of the same
        shapes, and the shift that is added once, whatever experts weigh,
        shape (C_out,); all float64.
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    if bias is not None:
        bias = bias.double() * scale
    return weight.double() * scale[:, None, None, None], bias, shift
