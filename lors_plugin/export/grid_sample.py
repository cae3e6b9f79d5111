"""GridSample as gathers.

TensorRT was reported to compile GridSample to something else; Gather and
products every runtime has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

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
        raise NotImplementedError(
            'only a bilinear grid_sample with zeros outside is exported as '
            'gathers; take --sampling grid_sample'
        )
    height, width = maps.shape[-2:]
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    # Of `arange`, exporters keep the number of images they have seen.
    image = torch.ones_like(x[:, :1, :1]).cumsum(0).long() - 1
    out = 0.0
    for down in (0, 1):
        row = y.floor() + down
        row_weight = (1 - (y - row).abs()) * _inside(row, height)
        for right in (0, 1):
            column = x.floor() + right
            weight = (1 - (x - column).abs()) * _inside(column, width)
            index = (image * height + _cell(row, height)) * width
            found = rows[index + _cell(column, width)]
            out = out + found * (weight * row_weight).unsqueeze(-1)
    return out.permute(0, 3, 1, 2)


def _inside(cell: Tensor, size: int) -> Tensor:
    return ((cell >= 0) & (cell < size)).to(cell.dtype)


def _cell(cell: Tensor, size: int) -> Tensor:
    """Clamp to the map; in a trace, the size is a tensor."""
    last = cell.new_zeros(()) + (size - 1)
    return cell.clamp(min=0).minimum(last).long()
