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
    channels = feats[0].shape[1] // groups
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(dtype).transpose(1, 2).flatten(0, 1)
        weights = level_weights(points[..., 2], strides)
        out = 0.0
        for feat, stride, weight in zip(feats, strides, weights):
            height, width = feat.shape[-2:]
            x = points[..., 0] / (width * stride) * 2 - 1
            y = points[..., 1] / (height * stride) * 2 - 1
            grid = torch.stack([x, y], dim=-1)
            maps = feat.to(dtype)
            maps = maps.reshape(batch * groups, channels, height, width)
            sampled = F.grid_sample(
                maps, grid, padding_mode='zeros', align_corners=False
            )
            out = out + sampled * weight.unsqueeze(1)
    # (B G, C, N, P) -> (B, N, G, P, C)
    out = out.reshape(batch, groups, channels, num_queries, num_points)
    return out.permute(0, 3, 1, 4, 2)
