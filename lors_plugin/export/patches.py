"""Patches of images and of maps in operators that leave sizes open.

MMPretrain, MMDetection and MMCV compute with Python numbers how far maps are
padded; an exporter writes these numbers into the file. Here they are tensors
where a tracer looks on.
"""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Side = Union[int, Tensor]  # a tensor where a tracer looks on


class Grid(tuple):
    """Height and width of a map, and what has been derived from them."""

    def __new__(cls, size: tuple[Side, Side]) -> 'Grid':
        """Keep a grid as it is."""
        if isinstance(size, cls):
            return size
        grid = super().__new__(cls, size)
        grid.known = {}
        return grid


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens in another order.

    Args:
        tokens (Tensor): Shape (B, L, C).
        index (Tensor): Which ones, ``L`` for zeros, shape (K,).

    Returns:
        Tensor: Shape (B, K, C).
    """
    return F.pad(tokens, (0, 0, 0, 1)).index_select(1, index)


def take_cells(
    rows: Tensor, columns: Tensor, grid: tuple[Side, Side]
) -> Tensor:
    """For :func:`take`: the cells of patches or windows, row by row in each.

    Args:
        rows (Tensor): Of the map, shape (patches down, rows of a patch).
        columns (Tensor): The same across.
        grid (tuple): Height and width; cells outside are zeros.

    Returns:
        Tensor: Shape (patches down, patches across, rows of a patch,
        columns of a patch).
    """
    height, width = grid
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = (rows >= 0) & (rows < height)
    inside = inside & (columns >= 0) & (columns < width)
    return torch.where(inside, rows * width + columns, height * width)


class Steps:
    """How a kernel walks along a side of a map.

    Args:
        layer (nn.Module): A convolution or ``nn.Unfold``.
        adaptive (nn.Module, optional): ``AdaptivePadding`` in front of it.
        dim (int): 0 for the height, 1 for the width.
    """

    def __init__(
        self, layer: nn.Module, adaptive: Optional[nn.Module], dim: int
    ) -> None:
        self.stride = _pair(layer.stride)[dim]
        self.dilation = _pair(layer.dilation)[dim]
        self.kernel = _pair(layer.kernel_size)[dim]
        self.reach = self.dilation * (self.kernel - 1) + 1
        self.padding = 0 if adaptive else _pair(layer.padding)[dim]
        self.mode = adaptive.padding if adaptive else None

    def pad(self, side: Side) -> tuple[Side, Side]:
        """Zeros before and behind a side."""
        if self.mode is None:
            return self.padding, self.padding
        steps = (side + self.stride - 1) // self.stride
        total = (steps - 1) * self.stride + self.reach - side
        total = torch.as_tensor(total).clamp(min=0)
        first = total // 2 if self.mode == 'same' else 0
        return first, total - first

    def walk(self, side: Side, device: torch.device) -> Tensor:
        """Cells that each step sees, shape (steps, cells)."""
        first, last = self.pad(side)
        steps = (side + first + last - self.reach) // self.stride + 1
        start = torch.arange(steps, device=device) * self.stride - first
        cell = torch.arange(self.kernel, device=device) * self.dilation
        return start.unsqueeze(1) + cell

    def before(self, needed: int) -> int:
        """The smallest side that gives so many steps."""
        if self.mode is None:
            reach = self.reach - 2 * self.padding
            return max((needed - 1) * self.stride + reach, 1)
        return (needed - 1) * self.stride + 1


class ExportPatchMerging(nn.Module):
    """``PatchMerging`` of MMCV, MMPretrain and MMDetection.

    Args:
        source (nn.Module): In evaluation mode.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        adaptive = _adaptive(source)
        self.steps = [Steps(source.sampler, adaptive, dim) for dim in (0, 1)]
        self.norm = nn.Identity() if source.norm is None else source.norm
        self.reduction = source.reduction
        self.use_post_norm = getattr(source, 'use_post_norm', False)

    def forward(
        self, x: Tensor, input_size: tuple[Side, Side]
    ) -> tuple[Tensor, Grid]:
        """Merge.

        Args:
            x (Tensor): Shape (B, H W, C).
            input_size (tuple): ``H`` and ``W``.

        Returns:
            tuple: Tokens of shape (B, H' W', C'), and their height and width.
        """
        rows, columns = (
            step.walk(side, x.device)
            for step, side in zip(self.steps, input_size)
        )
        index = take_cells(rows, columns, input_size).flatten()
        cells = rows.shape[1] * columns.shape[1]
        patches = take(x, index).reshape(x.shape[0], -1, cells, x.shape[2])
        # Unfold has the channels first.
        x = patches.transpose(2, 3).flatten(2)
        if self.use_post_norm:
            x = self.norm(self.reduction(x))
        else:
            x = self.reduction(self.norm(x))
        return x, Grid((rows.shape[0], columns.shape[0]))

    def before(self, needed: tuple[int, int]) -> tuple[int, int]:
        """The smallest map that becomes one of the size that is needed."""
        return tuple(map(Steps.before, self.steps, needed))


class ExportPatchEmbed(nn.Module):
    """``PatchEmbed`` of MMCV and MMDetection, and positions behind it.

    Args:
        source (nn.Module): In evaluation mode.
        backbone (nn.Module): What it is of. If it adds positions, as
            MMPretrain's Swin can, this does so from now on.
    """

    def __init__(self, source: nn.Module, backbone: nn.Module) -> None:
        super().__init__()
        adaptive = _adaptive(source)
        self.steps = [
            Steps(source.projection, adaptive, dim) for dim in (0, 1)
        ]
        self.source = source
        self.mode = None
        shape = getattr(backbone, 'patch_resolution', None)
        if shape and getattr(backbone, 'use_abs_pos_embed', False):
            backbone.use_abs_pos_embed = False
            position = backbone.absolute_pos_embed.detach()
            position = position.view(1, *shape, -1).permute(0, 3, 1, 2)
            self.mode = backbone.interpolate_mode
            self.register_buffer('position', position)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Shape (B, 3, H, W) to (B, H' W', C), and height and width."""
        x, size = self.source(x)
        if self.mode is not None:
            # Hosts omit this at the size of training, where it does nothing.
            position = F.interpolate(
                self.position, size=size, mode=self.mode, align_corners=False
            )
            x = x + position.flatten(2).transpose(1, 2)
        return x, Grid(size)

    before = ExportPatchMerging.before


class ExportPadding(nn.Module):
    """``AdaptivePadding`` of MMCV and MMDetection.

    Args:
        source (nn.Module): Left as it is.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.padding = source.padding
        self.steps = [Steps(source, source, dim) for dim in (0, 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., H, W), in and out."""
        rows, columns = map(Steps.pad, self.steps, x.shape[-2:])
        return F.pad(x, (*columns, *rows))


def _adaptive(module: nn.Module) -> Optional[nn.Module]:
    """``AdaptivePadding`` of a layer, by the names that the hosts give it."""
    found = getattr(module, 'adaptive_padding', None)
    return found or getattr(module, 'adap_padding', None)


def _pair(value: Union[int, tuple]) -> tuple:
    return value if isinstance(value, tuple) else (value, value)
