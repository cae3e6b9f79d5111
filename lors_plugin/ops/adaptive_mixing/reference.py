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
        # The sum over K is part of the product: rows of K r elements.
        left = self.left.transpose(1, 2).flatten(2)
        return left @ (self.core @ self.right).flatten(-3, -2)


def split_weights(
    weights: Tensor, num_points: int, width: int
) -> tuple[Tensor, Tensor]:
    """Cut generated numbers into the two kinds of matrices, as views.

    Args:
        weights (Tensor): Shape (B, N, G, C C + Q P).
        num_points (int): ``P``.
        width (int): ``C``.

    Returns:
        tuple[Tensor]: Channel matrices (B, N, G, C, C) and spatial
        matrices (B, N, G, Q, P).
    """
    channel = weights[..., : width**2].unflatten(-1, (width, width))
    spatial = weights[..., width**2 :]
    out_points = spatial.shape[-1] // num_points
    return channel, spatial.unflatten(-1, (out_points, num_points))


def norm_relu(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last two dimensions, no weights, then ReLU.

    Statistics are float32 at least; the result has the type of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Constants in an exported graph, where the batch may stay open.
    sizes = [int(size) for size in x.shape[-2:]]
    return F.layer_norm(wide, sizes, eps=eps).relu().to(x.dtype)


def adaptive_mixing_reference(
    x: Tensor,
    weights: Tensor,
    channel_low_rank: Optional[LowRank],
    spatial_low_rank: Optional[LowRank],
    eps: float,
) -> Tensor:
    """See :func:`lors_plugin.ops.adaptive_mixing`."""
    channel, spatial = split_weights(weights, *x.shape[-2:])
    if channel_low_rank is not None:
        channel = channel + channel_low_rank.product()
    if spatial_low_rank is not None:
        spatial = spatial + spatial_low_rank.product()
    y = norm_relu(x @ channel, eps)
    return norm_relu(spatial @ y, eps)
