"""AdaMixer's 3D sampling in operators that every runtime has."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.adamixer.sampling import AdaptiveSampling3D

KINDS = ('gather', 'grid_sample')


def level_shares(z: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """Weight of each level, a list of tensors of the shape of ``z``."""
    scales = z.new_tensor([math.log2(stride) for stride in strides])
    shares = (-((z.unsqueeze(-1) - scales) ** 2) / 2).softmax(-1)
    return [shares[..., i] for i in range(len(strides))]


def by_gather(feat: Tensor, xy: Tensor, share: Tensor) -> Tensor:
    """Read one level bilinearly, zero outside, four rows a point.

    TensorRT was seen to compile GridSample to something else; this has only
    Gather and products.

    Args:
        feat (Tensor): Shape (B, G C, H, W).
        xy (Tensor): Cells of the level, the centre of the first at 0, shape
            (B, N, G, P, 2).
        share (Tensor): Weight of the level, shape (B, N, G, P).

    Returns:
        Tensor: Shape (B, N, G, P, C).
    """
    batch, groups = xy.shape[0], xy.shape[2]
    height, width = feat.shape[2], feat.shape[3]
    # Rows of C channels: ((b H + y) W + x) G + g.
    channels = feat.shape[1] // groups
    table = feat.permute(0, 2, 3, 1).reshape(-1, channels)
    corner = xy.floor()
    part = xy - corner
    left, top = corner[..., 0], corner[..., 1]
    image = torch.arange(batch, device=feat.device).view(-1, 1, 1, 1) * height
    group = torch.arange(groups, device=feat.device).view(1, 1, -1, 1)
    out = None
    for down in (0, 1):
        y = top + down
        weight_y = part[..., 1] if down else 1 - part[..., 1]
        inside_y = (y >= 0) & (y <= height - 1)
        row = (
            image
            + y.clamp(min=0).minimum(y.new_zeros(()) + (height - 1)).long()
        )
        for right in (0, 1):
            x = left + right
            weight = weight_y * (part[..., 0] if right else 1 - part[..., 0])
            inside = inside_y & (x >= 0) & (x <= width - 1)
            column = (
                x.clamp(min=0).minimum(x.new_zeros(()) + (width - 1)).long()
            )
            index = (row * width + column) * groups + group
            weight = weight * share * inside.to(share.dtype)
            found = table[index] * weight.unsqueeze(-1)
            out = found if out is None else out + found
    return out


def by_grid_sample(feat: Tensor, xy: Tensor, share: Tensor) -> Tensor:
    """The same by one GridSample; arguments as of :func:`by_gather`."""
    groups = xy.shape[2]
    height, width = feat.shape[2], feat.shape[3]
    grid = torch.stack(
        [
            (xy[..., 0] * 2 + 1) / width - 1,
            (xy[..., 1] * 2 + 1) / height - 1,
        ],
        -1,
    )
    grid = grid.transpose(1, 2).flatten(0, 1)
    maps = feat.unflatten(1, (groups, -1)).flatten(0, 1)
    found = F.grid_sample(
        maps, grid, padding_mode='zeros', align_corners=False
    )
    # (B G, C, N, P) -> (B, N, G, P, C)
    found = found.unflatten(0, (-1, groups)).permute(0, 3, 1, 4, 2)
    return found * share.unsqueeze(-1)


class ExportSampling(nn.Module):
    """:class:`AdaptiveSampling3D` for export.

    Args:
        source (AdaptiveSampling3D): Makes the points.
        kind (str): 'gather' or 'grid_sample'.
    """

    def __init__(self, source: AdaptiveSampling3D, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'sampling={kind!r} must be one of {KINDS}')
        self.source = source
        self.read = by_gather if kind == 'gather' else by_grid_sample

    def forward(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        strides: Sequence[int],
    ) -> Tensor:
        """As :meth:`AdaptiveSampling3D.forward`."""
        points = self.source.points(content, xyzr)
        shares = level_shares(points[..., 2], strides)
        out = 0.0
        for feat, stride, share in zip(feats, strides, shares):
            cells = points[..., :2] / stride - 0.5
            out = out + self.read(feat, cells, share)
        return out
