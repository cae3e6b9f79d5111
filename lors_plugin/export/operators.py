"""Operators that an exporter cannot follow while sizes stay open."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SAMPLING = ('gather', 'grid_sample')


class ExportOperators(TorchFunctionMode):
    """Replace calls of functions while a model is exported.

    - A layer norm needs to know its sizes, which shapes of traced tensors do
      not tell; they never depend on the images.
    - ``grid_sample`` becomes four gathers, unless it is asked for: TensorRT
      was reported to compile GridSample to something else.

    Args:
        sampling (str): 'gather' or 'grid_sample'.
    """

    def __init__(self, sampling: str = 'gather') -> None:
        super().__init__()
        if sampling not in SAMPLING:
            raise ValueError(
                f'sampling={sampling!r} must be one of {SAMPLING}'
            )
        self.sampling = sampling

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            x, sizes, *rest = args
            return func(x, [int(size) for size in sizes], *rest, **kwargs)
        if func is F.grid_sample and self.sampling == 'gather':
            return grid_sample_by_gather(*args, **kwargs)
        return func(*args, **kwargs)


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
    if (mode, padding_mode, bool(align_corners)) != (
        'bilinear',
        'zeros',
        False,
    ):
        raise NotImplementedError(
            'only a bilinear grid_sample with zeros outside is exported as '
            'gathers; take --sampling grid_sample'
        )
    batch, _, height, width = maps.shape
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    first = torch.arange(batch, device=maps.device) * (height * width)
    x = ((grid[..., 0] + 1) * width - 1) / 2
    y = ((grid[..., 1] + 1) * height - 1) / 2
    out = 0.0
    for down in (0, 1):
        row = y.floor() + down
        row_weight = (1 - (y - row).abs()) * _inside(row, height)
        for right in (0, 1):
            column = x.floor() + right
            weight = (1 - (x - column).abs()) * _inside(column, width)
            index = _cell(row, height) * width + _cell(column, width)
            found = rows[index + first.view(-1, 1, 1)]
            out = out + found * (weight * row_weight).unsqueeze(-1)
    return out.permute(0, 3, 1, 2)


def _inside(cell: Tensor, size: int) -> Tensor:
    return ((cell >= 0) & (cell < size)).to(cell.dtype)


def _cell(cell: Tensor, size: int) -> Tensor:
    """Clamp to the map; in a trace, the size is a tensor."""
    last = cell.new_zeros(()) + (size - 1)
    return cell.clamp(min=0).minimum(last).long()
