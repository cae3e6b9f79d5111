"""Boxes as AdaMixer's decoder sees them: ``(x, y, z, r)``.

``x, y`` are the centre in pixels, ``z = log2 sqrt(w h)`` the scale and
``r = log2(h / w)`` the aspect ratio (AdaMixer, section 3.1). Everything here
runs in float32, also under autocast, since box coordinates of a large image
need more digits than a half-precision number has.
"""

import torch
from torch import Tensor


def boxes_from_sizes(sizes: Tensor) -> Tensor:
    """The box that covers the whole image.

    Args:
        sizes (Tensor): Width and height in pixels, shape (..., 2).

    Returns:
        Tensor: (x, y, z, r), shape (..., 4).
    """
    width, height = sizes.unbind(-1)
    z = (width * height).sqrt().log2()
    return torch.stack(
        [width / 2, height / 2, z, (height / width).log2()], dim=-1
    )


def decode_boxes(xyzr: Tensor) -> Tensor:
    """Corners of boxes.

    Args:
        xyzr (Tensor): Shape (..., 4).

    Returns:
        Tensor: (x1, y1, x2, y2) in pixels, shape (..., 4).
    """
    centre, half = xyzr[..., :2], box_sizes(xyzr) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_sizes(xyzr: Tensor) -> Tensor:
    """Width and height in pixels, shape (..., 2), of boxes (..., 4)."""
    z, r = xyzr[..., 2:3], xyzr[..., 3:4]
    return torch.cat([2 ** (z - r / 2), 2 ** (z + r / 2)], dim=-1)


def refine_boxes(xyzr: Tensor, delta: Tensor) -> Tensor:
    """Move boxes by a predicted step, in units of their own scale.

    Args:
        xyzr (Tensor): Shape (..., 4).
        delta (Tensor): Raw output of the box branch, shape (..., 4).

    Returns:
        Tensor: (x, y, z, r), shape (..., 4), float32.
    """
    delta = delta.to(xyzr.dtype)
    centre = xyzr[..., :2] + delta[..., :2] * 2 ** xyzr[..., 2:3]
    return torch.cat([centre, xyzr[..., 2:] + delta[..., 2:]], dim=-1)


def intersection_over_foreground(xyzr: Tensor) -> Tensor:
    """Compute the share of box i that box j covers: ``|i and j| / |i|``.

    Args:
        xyzr (Tensor): Shape (B, N, 4).

    Returns:
        Tensor: Shape (B, N, N), between 0 and 1.
    """
    boxes = decode_boxes(xyzr)
    top_left = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    bottom_right = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return overlap / area.clamp(min=1e-6)[:, :, None]


def box_position_encoding(xyzr: Tensor, width: int) -> Tensor:
    """Sinusoidal code of a box.

    Each of ``x / 1000, y / 1000, z, r`` gives ``width / 4`` numbers, sines
    at even and cosines at odd places.

    Args:
        xyzr (Tensor): Shape (..., 4).
        width (int): Length of the code, divisible by 4.

    Returns:
        Tensor: Shape (..., width), float32.
    """
    each = width // 4
    index = torch.arange(each, device=xyzr.device)
    exponent = 2 * index.div(2, rounding_mode='floor') / each
    # No tensor of constants: a GPU would wait for it in every stage.
    values = torch.cat([xyzr[..., :2] / 1000, xyzr[..., 2:]], dim=-1)
    angle = values[..., None] / 10000**exponent
    code = torch.where(index % 2 == 0, angle.sin(), angle.cos())
    return code.flatten(-2)
