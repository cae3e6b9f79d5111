"""The definition of 3D sampling, to be read beside the paper."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """Weight of each level for points of scale ``z`` (AdaMixer, eq. 6).

    Args:
        z (Tensor): log2 of pixels, any shape.
        strides (Sequence[int]): Pixels a cell of each of L levels.

    Returns:
        Tensor: Shape (L, *z.shape); sums to 1 over the first dimension.
    """
    scales = z.new_tensor([math.log2(stride) for stride in strides])
    distance = z - scales.view(-1, *[1] * z.dim())
    return (-(distance**2) / 2).softmax(dim=0)


def sampling_3d_reference(
    feats: Sequence[Tensor], points: Tensor, strides: Sequence[int]
) -> Tensor:
    """See :func:`lors_plugin.ops.sampling_3d`."""
    dtype = torch.promote_types(points.dtype, torch.float32)
    batch, num_queries, groups, num_points, _ = points.shape
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(dtype).transpose(1, 2).flatten(0, 1)
        weights = level_weights(points[..., 2], strides)
        out = 0.0
        for feat, stride, weight in zip(feats, strides, weights):
            height, width = feat.shape[-2:]
            size = points.new_tensor([width * stride, height * stride])
            grid = points[..., :2] / size * 2 - 1
            maps = feat.to(dtype).unflatten(1, (groups, -1)).flatten(0, 1)
            sampled = F.grid_sample(
                maps, grid, padding_mode='zeros', align_corners=False
            )
            out = out + sampled * weight.unsqueeze(1)
    # (B G, C, N, P) -> (B, N, G, P, C)
    out = out.unflatten(0, (batch, groups))
    return out.permute(0, 3, 1, 4, 2)
