"""Convolutions of images that lie side by side in memory, for inference.

Maps have shape (L, B, C): at each of ``L`` places, row by row, the channels of
all images, one image after the other. A depth-wise convolution of all images
is then one convolution with ``B C`` channels last, for which a CPU library
copies nothing, and a pointwise one is a batched product with strides.

A map may come in parts, each with some of the channels: whoever reads it next
then saves joining them.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


class KernelSpace:
    """Memory for the mixed kernels of one layer after the other.

    Memory that was just written is still in the processor's cache; fresh
    memory would have to be fetched from the system, layer by layer.

    Args:
        like (Tensor): Of the type and on the device of the kernels.
        size (int): Numbers of all kernels of the largest layer.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        self._memory = like.new_empty(size)

    def mix(self, experts: Tensor, attention: Tensor) -> Tensor:
        """Mix kernels, which stay until the next ones are mixed.

        Args:
            experts (Tensor): Shape (M, C_out, C_in / groups, kh, kw).
            attention (Tensor): Shape (B, M), of the same type.

        Returns:
            Tensor: Shape (B, C_out * C_in / groups * kh * kw).
        """
        batch, experts = attention.shape[0], experts.flatten(1)
        size = experts.shape[1]
        mixed = self._memory.as_strided((batch, size), (size, 1))
        return torch.mm(attention, experts, out=mixed)


def mean(maps: Tensor) -> Tensor:
    """The mean of each channel of each image, shape (L, B, C) to (B, C)."""
    places, batch, channels = maps.shape
    # A sum has a gradient that needs no memory; a product is faster.
    if torch.is_grad_enabled():
        return maps.sum(0).mul_(1 / places)
    row = _average(places, maps.dtype)
    return row.mm(maps.flatten(1)).view(batch, channels)


@lru_cache(maxsize=32)
def _average(places: int, dtype: torch.dtype) -> Tensor:
    """The row that a matrix (L, N) is multiplied with for its mean."""
    with torch.inference_mode(False):
        return torch.full((1, places), 1 / places, dtype=dtype, device='cpu')


def to_images(maps: Tensor, size: Pair) -> Tensor:
    """Maps (L, B, C) of a height and width as contiguous (B, C, H, W)."""
    return maps.unflatten(0, size).permute(2, 3, 0, 1).contiguous()


def as_one_image(maps: Tensor, size: Pair) -> Tensor:
    """Maps (L, B, C) of a height and width as one image of B C channels."""
    places, batch, channels = maps.shape
    height, width = size
    one = maps.view(1, height, width, batch * channels)
    return one.permute(0, 3, 1, 2)


def multiply(parts: Sequence[Tensor], kernels: Tensor, out: Tensor) -> Tensor:
    """Multiply each place with the image's kernel.

    Args:
        parts (Sequence[Tensor]): Shapes (L, B, C_i), together ``C_in``.
        kernels (Tensor): Shape (B, C_out, C_in), or (1, C_out, C_in) for
            one kernel for all, where ``B`` dimensions must be contiguous.
        out (Tensor): Shape (L, B, C_out); written.

    Returns:
        Tensor: ``out``.
    """
    shared = len(kernels) == 1
    product = out.flatten(0, 1) if shared else out.transpose(0, 1)
    start = 0
    for part in parts:
        stop = start + part.shape[2]
        kernel = kernels if len(parts) == 1 else kernels[..., start:stop]
        beta = min(start, 1)
        if shared:
            factors = part.flatten(0, 1), kernel[0].t()
            torch.addmm(product, *factors, beta=beta, out=product)
        else:
            factors = part.transpose(0, 1), kernel.mT
            torch.baddbmm(product, *factors, beta=beta, out=product)
        start = stop
    return out


def pointwise(
    parts: Sequence[Tensor], kernels: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Multiply each place with the image's kernel, scale and shift.

    Args:
        parts (Sequence[Tensor]): Shapes (L, B, C_i), together ``C_in``.
        kernels (Tensor): Shape (B, C_out * C_in), or (1, C_out * C_in) for
            one kernel for all.
        scale, shift (Tensor): Shape (C_out,).

    Returns:
        Tensor: Shape (L, B, C_out).
    """
    places, batch, _ = parts[0].shape
    number, rows = kernels.shape[0], scale.shape[0]
    if number > 1:
        kernels = kernels.view(number, rows, -1)
        out = parts[0].new_empty(places, batch, rows)
        multiply(parts, kernels, out)
        return torch.addcmul(shift, out, scale, out=out)
    # Fewer views than for each image its own: what small maps cost.
    kernel = kernels.view(rows, -1).t()
    if len(parts) == 1:
        out = parts[0].flatten(0, 1).mm(kernel)
    else:
        first, *others = kernel.split([part.shape[2] for part in parts])
        out = parts[0].flatten(0, 1).mm(first)
        for part, kernel in zip(parts[1:], others):
            out.addmm_(part.flatten(0, 1), kernel)
    torch.addcmul(shift, out, scale, out=out)
    return out.view(places, batch, rows)


def depthwise(
    maps: Tensor,
    size: Pair,
    kernels: Tensor,
    shift: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Pair]:
    """Convolve each channel with its own kernel, then shift.

    Args:
        maps (Tensor): Shape (L, B, C).
        size (tuple[int]): Height and width.
        kernels (Tensor): Shape (B, C, 1, kh, kw), or (1, ...) for one kernel
            for all.
        shift (Tensor): Shape (C,).
        stride, padding, dilation (tuple[int]): As (y, x).

    Returns:
        tuple[Tensor, tuple[int]]: Shape (L', B, C), and its height and width.
    """
    batch, channels = maps.shape[1:]
    if batch > 1:
        kernels = kernels.expand(batch, -1, -1, -1, -1)
        shift = shift.expand(batch, -1).flatten()
    kernels = kernels.reshape(batch * channels, *kernels.shape[2:])
    out = torch.conv2d(
        as_one_image(maps, size), kernels, shift,
        stride, padding, dilation, batch * channels,
    )  # fmt: skip
    _, _, height, width = out.shape
    out = out.permute(2, 3, 0, 1).reshape(height * width, batch, channels)
    return out, (height, width)


def convolve_images(
    images: Tensor,
    kernels: Tensor,
    shift: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Pair]:
    """Convolve each image with its own kernel, shift, and lay side by side.

    Args:
        images (Tensor): Shape (B, C_in, H, W).
        kernels (Tensor): Shape (B, C_out, C_in, kh, kw), or (1, ...) for
            one kernel for all.
        shift (Tensor): Shape (C_out,).
        stride, padding, dilation (tuple[int]): As (y, x).

    Returns:
        tuple[Tensor, tuple[int]]: Shape (L, B, C_out), and its height and
        width.
    """
    geometry = stride, padding, dilation
    # Libraries put channels last where images have, without a copy.
    images = images.contiguous(memory_format=torch.channels_last)
    maps = None
    for i, kernel in enumerate(kernels.expand(len(images), -1, -1, -1, -1)):
        out = F.conv2d(images[i : i + 1], kernel, shift, *geometry)
        out = out[0].permute(1, 2, 0)
        if len(images) == 1:
            return out.reshape(-1, 1, out.shape[2]), tuple(out.shape[:2])
        if maps is None:
            maps = out.new_empty(*out.shape[:2], len(images), out.shape[2])
        maps[:, :, i] = out
    return maps.flatten(0, 1), tuple(maps.shape[:2])
