"""Bilinear sampling by gathers, of AdaMixer and of ``F.grid_sample``.

TensorRT was reported to compile GridSample to something else; Gather and
products every engine has. Rows of all channels of a cell are gathered, one
cell at a time, and added up where they are needed: no map and no result is
transposed but the maps themselves, once for all stages of a decoder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.adamixer.sampling import AdaptiveSampling3D
from lors_plugin.ops.sampling_3d.reference import level_weights

from .check import ExportError

SAMPLING = ('gather', 'grid_sample')


@contextmanager
def sampled_by(sampling: str) -> Iterator[None]:
    """Choose the operators that stand for ``F.grid_sample`` in a trace.

    Args:
        sampling (str): 'gather' or 'grid_sample'.
    """
    if sampling not in SAMPLING:
        raise ValueError(f'sampling={sampling!r} must be one of {SAMPLING}')
    original = F.grid_sample
    if sampling == 'gather':
        F.grid_sample = grid_sample_by_gather
    try:
        yield
    finally:
        F.grid_sample = original


def grid_sample_by_gather(
    maps: Tensor,
    grid: Tensor,
    mode: str = 'bilinear',
    padding_mode: str = 'zeros',
    align_corners: bool = False,
) -> Tensor:
    """Compute a bilinear ``grid_sample`` with zeros outside by gathers.

    Args:
        maps (Tensor): Shape (B, C, H, W).
        grid (Tensor): x and y from -1 to 1, shape (B, N, P, 2).

    Returns:
        Tensor: Shape (B, C, N, P).
    """
    if (mode, padding_mode) != ('bilinear', 'zeros') or align_corners:
        raise ExportError(
            'only a bilinear grid_sample with zeros outside is exported as '
            'gathers; take --sampling grid_sample'
        )
    height, width = maps.shape[-2:]
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    out = 0.0
    for cell, weight in _corners(x, y, height, width):
        out = out + rows[cell] * weight.unsqueeze(-1)
    return out.permute(0, 3, 1, 2)


class GatherSampling3D(nn.Module):
    """:class:`AdaptiveSampling3D` by gathers.

    Args:
        source (AdaptiveSampling3D): Its offsets are shared.
    """

    def __init__(self, source: AdaptiveSampling3D) -> None:
        super().__init__()
        self.offsets = source.offsets
        self.points, self.groups = source.points, source.num_groups

    def forward(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        strides: Sequence[int],
    ) -> Tensor:
        """See :meth:`AdaptiveSampling3D.forward`."""
        points = self.points(content, xyzr)
        weights = level_weights(points[..., 2], strides)
        group = torch.arange(self.groups, device=points.device).view(-1, 1)
        out = 0.0
        for feat, stride, share in zip(feats, strides, weights):
            width = feat.shape[1] // self.groups
            # A cell has a row for each group.
            rows = feat.permute(0, 2, 3, 1).reshape(-1, width)
            x, y = points[..., 0] / stride - 0.5, points[..., 1] / stride - 0.5
            for cell, weight in _corners(x, y, *feat.shape[-2:]):
                found = rows[cell * self.groups + group]
                out = out + found * (weight * share).unsqueeze(-1)
        return out


def sample_by_gather(model: nn.Module) -> None:
    """Replace the sampling of all stages of a decoder, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, AdaptiveSampling3D):
                setattr(module, name, GatherSampling3D(child))


def _corners(
    x: Tensor, y: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the four cells around points, and their weights.

    Args:
        x (Tensor): Columns, 0 at the centre of the first; shape (B, ...).
        y (Tensor): Rows.
        height (int): Of the map; in a trace a tensor.
        width (int): Of the map.

    Yields:
        tuple[Tensor]: Numbers of the cells in all B maps, row by row, and
        weights, 0 outside, both of the shape of ``x``.
    """
    first = x[(slice(None), *[slice(1)] * (x.dim() - 1))]
    # Of `arange`, exporters keep the number of images they have seen.
    image = torch.ones_like(first).cumsum(0).long() - 1
    columns = [_nearest(x, right, width) for right in (0, 1)]
    for down in (0, 1):
        row, row_weight = _nearest(y, down, height)
        start = (image * height + row) * width
        for column, weight in columns:
            yield start + column, row_weight * weight


def _nearest(place: Tensor, after: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the cell before or after places on an axis, and its weight."""
    cell = place.floor() + after
    inside = ((cell >= 0) & (cell < size)).to(cell.dtype)
    # In a trace, the size is a tensor.
    last = cell.new_zeros(()) + (size - 1)
    weight = (1 - (place - cell).abs()) * inside
    return cell.clamp(min=0).minimum(last).long(), weight
