"""Convolutions of images that lie side by side in memory, for inference.

Maps of shape (B, C, H, W) whose places hold the channels of all images, one
image after the other: memory (H, W, B, C). A depth-wise convolution of all
images is then one convolution with ``B C`` channels last, for which a CPU
library copies nothing, and a pointwise one is a batched product with strides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def lay(x: Tensor) -> Tensor:
    """The same maps, in this order in memory; a view if they are already."""
    return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def is_laid(x: Tensor) -> bool:
    """Whether maps have this order in memory, and no other one."""
    return not x.is_contiguous() and x.permute(2, 3, 0, 1).is_contiguous()


def mean(x: Tensor) -> Tensor:
    """The mean of each channel of each image, shape (B, C).

    As a product, which takes half the time of a sum.
    """
    maps = x.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
    places = len(maps)
    weights = maps.new_full((1, places), 1 / places)
    return weights.mm(maps).view(len(x), -1)


def join_channels(parts: list[Tensor]) -> Tensor:
    """Concatenate maps along their channels, in this order in memory."""
    parts = [part.permute(2, 3, 0, 1) for part in parts]
    return torch.cat(parts, 3).permute(2, 3, 0, 1)


def conv2d(
    x: Tensor,
    kernels: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Convolve each image with its own kernel, scale and shift the result.

    Args:
        x (Tensor): Shape (B, C_in, H, W), at best from :func:`lay`.
        kernels (Tensor): Shape (B, C_out, C_in / groups, kh, kw).
        scale (Tensor): Shape (C_out,).
        shift (Tensor): Added to the result, shape (C_out,) or (B, C_out).
        stride, padding, dilation (tuple[int]): As (y, x).
        groups (int): Of the convolution.

    Returns:
        Tensor: New, shape (B, C_out, H_out, W_out), laid out as above.
    """
    batch, rows, columns = kernels.shape[:3]
    maps = x.permute(2, 3, 0, 1).contiguous()
    one_place = kernels.shape[3:] == (1, 1) and max(padding) == 0
    if groups == 1 and one_place:
        if max(stride) > 1:
            maps = maps[:: stride[0], :: stride[1]].contiguous()
        tokens = maps.flatten(0, 1)
        matrices = kernels.view(batch, rows, columns).mT
        out = tokens.new_empty(len(tokens), batch, rows)
        if batch == 1:
            torch.mm(tokens[:, 0], matrices[0], out=out[:, 0])
        else:
            images = tokens.transpose(0, 1), matrices
            torch.bmm(*images, out=out.transpose(0, 1))
        torch.addcmul(shift, out, scale, out=out)
        out = out.unflatten(0, maps.shape[:2])
        return out.permute(2, 3, 0, 1)
    kernels = kernels * scale[:, None, None, None]
    offsets = shift.expand(batch, rows).flatten()
    side = maps.flatten(2)[None].permute(0, 3, 1, 2)
    if columns > 1:
        # Grouped, not depth-wise: libraries are faster with planes.
        side = side.contiguous()
    out = F.conv2d(
        side,
        kernels.flatten(0, 1),
        offsets,
        stride,
        padding,
        dilation,
        batch * groups,
    )
    return lay(out.squeeze(0).unflatten(0, (batch, rows)))
