"""The definition of adaptive mixing, to be read beside the papers."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """Factors of ``sum_k left_k @ core_k(q) @ right_k`` (LORS, eq. 7).

    Attributes:
        left (Tensor): Shape (G, K, rows, r); one for all queries.
        core (Tensor): Shape (B, N, G, K, r, r); made from each query.
        right (Tensor): Shape (G, K, r, cols); one for all queries.
    """

    left: Tensor
    core: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The full matrices, shape (B, N, G, rows, cols)."""
        return (self.left @ self.core @ self.right).sum(dim=-3)


def norm_relu(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last two dimensions, no weights, then ReLU.

    Statistics and result are float32 at least, whatever autocast does.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(x, x.shape[-2:], eps=eps).relu()


def adaptive_mixing_reference(
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    channel_low_rank: Optional[LowRank],
    spatial_low_rank: Optional[LowRank],
    eps: float,
) -> Tensor:
    """See :func:`lors_plugin.ops.adaptive_mixing`."""
    if channel_low_rank is not None:
        channel = channel + channel_low_rank.product()
    if spatial_low_rank is not None:
        spatial = spatial + spatial_low_rank.product()
    y = norm_relu(x @ channel, eps)
    return norm_relu(spatial @ y, eps)
