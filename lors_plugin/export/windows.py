"""Swin's windows in operators that leave sizes open.

Tokens are brought into windows, and back, by one Gather each: padding,
rolling and cutting are in its index, which the blocks of a stage share, as
they do the mask of what may attend to what.
"""

from typing import Optional

import torch
from torch import Tensor, nn

from .patches import (
    ExportPadding,
    ExportPatchEmbed,
    ExportPatchMerging,
    Grid,
    Side,
    take,
    take_cells,
)

FORBIDDEN = -100.0  # what hosts add to scores of tokens apart


class EnoughRows(nn.Module):
    """Refuses maps that are smaller than a window, as MMPretrain does.

    A file has no other way to stop than to fail: an Expand to one cell more
    than there are, which ONNX Runtime does not optimise away as it does a
    Reshape. It names the node, and the node is named by where this module is.

    Args:
        window (int): Side of a window.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, index: Tensor, side: Tensor) -> Tensor:
        """Flatten an index.

        Args:
            index (Tensor): Any shape.
            side (Tensor): The shorter one of the map.

        Returns:
            Tensor: Shape (cells,).
        """
        if not torch.jit.is_tracing() and side < self.window:
            raise ValueError(
                f'a map with a side of {int(side)} is smaller than a window '
                f'of {self.window}: give larger images, or set '
                'pad_small_map=True of the backbone'
            )
        index = index.flatten()
        return index.expand(index.shape[0] + (side < self.window))


class ExportShiftWindows(nn.Module):
    """``ShiftWindowMSA`` of MMPretrain and of MMDetection.

    Args:
        source (nn.Module): In evaluation mode.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.window, self.shift = source.window_size, source.shift_size
        # MMDetection has no such argument and pads.
        self.pad_small_map = getattr(source, 'pad_small_map', True)
        self.w_msa = source.w_msa
        if not self.pad_small_map:
            self.image_too_small = EnoughRows(self.window)

    def forward(self, query: Tensor, hw_shape: tuple[Side, Side]) -> Tensor:
        """Attend within windows.

        Args:
            query (Tensor): Shape (B, H W, C).
            hw_shape (tuple): ``H`` and ``W``.

        Returns:
            Tensor: Shape (B, H W, C).
        """
        known = Grid(hw_shape).known
        key = self.window, self.shift, self.pad_small_map
        if key not in known:
            known[key] = self._lay_out(hw_shape, query.device)
        there, back, mask = known[key]
        cells, channels = self.window**2, query.shape[2]
        for layer in self.w_msa.children():
            if hasattr(layer, 'num_windows'):
                layer.num_windows = there.shape[0] // cells
        windows = take(query, there).reshape(-1, cells, channels)
        windows = self.w_msa(windows, mask=mask)
        tokens = windows.reshape(query.shape[0], -1, channels)
        return tokens.index_select(1, back)

    def _lay_out(
        self, size: tuple[Side, Side], device: torch.device
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Where tokens go.

        Returns:
            tuple: The token of each place of each window, shape
            (windows cells,), the place of each token, shape (H W,), and what
            is added to the scores, shape (windows, cells, cells) or None.
        """
        window, cells = self.window, self.window**2
        side = torch.minimum(*(torch.as_tensor(side) for side in size))
        shift = self.shift
        if shift and not self.pad_small_map:
            shift = torch.where(side == window, 0, shift)
        sources, regions, places = [], [], []
        for length in size:
            whole = (length + window - 1) // window * window
            cell = torch.arange(whole, device=device)
            sources.append(((cell + shift) % whole).view(-1, window))
            region = (cell >= whole - window).long()
            region = region + (cell >= whole - shift).long()
            regions.append(region.view(-1, window))
            cell = torch.arange(length, device=device)
            places.append((cell + (whole - shift)) % whole)
        there = take_cells(*sources, size)
        if self.pad_small_map:
            there = there.flatten()
        else:
            there = self.image_too_small(there, side)
        row, column = places
        number = row // window * sources[1].shape[0]
        number = number.unsqueeze(1) + column // window
        within = (row % window * window).unsqueeze(1) + column % window
        back = (number * cells + within).flatten()
        if not self.shift:
            return there, back, None
        down, across = regions
        region = 3 * down[:, None, :, None] + across[None, :, None, :]
        region = region.reshape(-1, cells)
        apart = region.unsqueeze(1) != region.unsqueeze(2)
        return there, back, apart.float() * FORBIDDEN

    def before(self, needed: tuple[int, int]) -> tuple[int, int]:
        """The smallest map that this takes and that is not below another."""
        if self.pad_small_map:
            return needed
        return tuple(max(side, self.window) for side in needed)


# By where forward was written, so that subclasses with their own are left.
REPLACED = {
    'mmpretrain.models.utils.attention.ShiftWindowMSA': ExportShiftWindows,
    'mmdet.models.backbones.swin.ShiftWindowMSA': ExportShiftWindows,
    'mmcv.cnn.bricks.transformer.PatchMerging': ExportPatchMerging,
    'mmpretrain.models.utils.embed.PatchMerging': ExportPatchMerging,
    'mmdet.models.layers.transformer.utils.PatchMerging': ExportPatchMerging,
    'mmcv.cnn.bricks.transformer.AdaptivePadding': ExportPadding,
    'mmdet.models.layers.transformer.utils.AdaptivePadding': ExportPadding,
}
SWINS = (
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer',
    'mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2',
    'mmdet.models.backbones.swin.SwinTransformer',
)


def replace_windows(model: nn.Module) -> None:
    """Replace windows and patches of a model in evaluation mode, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = REPLACED.get(_origin(child))
            if kind is not None:
                setattr(parent, name, kind(child))
        if _origin(parent) in SWINS:
            parent.patch_embed = ExportPatchEmbed(parent.patch_embed, parent)


def smallest_shape(model: nn.Module) -> Optional[tuple[int, int]]:
    """The smallest images that the windows of an exported Swin take.

    Args:
        model (nn.Module): After :func:`replace_windows`.

    Returns:
        tuple[int] | None: Height and width; None of another model.
    """
    kinds = ExportPatchEmbed, ExportPatchMerging, ExportShiftWindows
    for backbone in model.modules():
        if _origin(backbone) not in SWINS:
            continue
        # Registered in the order in which they run.
        layers = [m for m in backbone.modules() if isinstance(m, kinds)]
        needed = 1, 1
        for layer in reversed(layers):
            needed = layer.before(needed)
        return needed
    return None


def _origin(module: nn.Module) -> str:
    forward = type(module).forward
    name = getattr(forward, '__qualname__', '').rpartition('.')[0]
    return f'{getattr(forward, "__module__", "")}.{name}'
