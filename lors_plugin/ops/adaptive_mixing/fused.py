"""Adaptive mixing without the copies, in plain PyTorch.

The channel side stays factored: ``x (M + l E r) = x M + (x l E) r`` costs
less than forming ``C x C`` matrices for every query, since there are fewer
points than channels. The spatial side is formed: its matrices are small and
``Q`` is larger than ``P``. All parameter groups go through one product.
"""

from typing import Optional

import torch
from torch import Tensor

from .reference import LowRank, norm_relu, split_weights


def adaptive_mixing_fused(
    x: Tensor,
    weights: Tensor,
    channel_low_rank: Optional[LowRank],
    spatial_low_rank: Optional[LowRank],
    eps: float,
) -> Tensor:
    """See :func:`lors_plugin.ops.adaptive_mixing`."""
    channel, spatial = split_weights(weights, *x.shape[-2:])
    y = x @ channel
    if channel_low_rank is not None:
        left, right = _join(channel_low_rank)
        y = y + (x @ left) @ right
    if spatial_low_rank is not None:
        left, right = _join(spatial_low_rank)
        spatial = spatial + left @ right
    y = norm_relu(y, eps)
    return norm_relu(spatial @ y, eps)


def _join(part: LowRank) -> tuple:
    """Parameter groups side by side, the core inside the right factor.

    Returns:
        tuple[Tensor]: ``left`` of shape (G, rows, K r) and ``core @ right``
        of shape (B, N, G, K r, cols).
    """
    left = torch.cat(part.left.unbind(1), dim=-1)
    right = (part.core @ part.right).flatten(-3, -2)
    return left, right
