"""What is counted in the place of modules that have no operator to count.

MMCV's deformable convolutions are compiled code that PyTorch knows nothing
of, and often they are not there at all. TorchVision's operator computes the
same and has shapes without numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DEFORMABLE = (
    'DeformConv2d',
    'DeformConv2dPack',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
)


def deformable_convolution(
    module: nn.Module,
    x: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
) -> Tensor:
    """``forward`` of MMCV's four deformable convolutions.

    Args:
        module (nn.Module): The convolution; it makes offsets and mask
            itself if it has a ``conv_offset``.
        x (Tensor): Shape (B, in_channels, H, W).
        offset (Tensor, optional): Shape (B, 2 kernel cells, H', W').
        mask (Tensor, optional): Shape (B, kernel cells, H', W').

    Returns:
        Tensor: Shape (B, out_channels, H', W').
    """
    from torchvision.ops import deform_conv2d

    if offset is None:
        offset = module.conv_offset(x)
        if 'Modulated' in type(module).__name__:
            first, second, mask = offset.chunk(3, dim=1)
            offset, mask = torch.cat([first, second], 1), mask.sigmoid()
    return deform_conv2d(
        x,
        offset,
        module.weight,
        getattr(module, 'bias', None),
        module.stride,
        module.padding,
        module.dilation,
        mask,
    )


@contextmanager
def counted_modules(model: nn.Module) -> Iterator[None]:
    """Run stand-ins inside the context, and fixed implementations.

    The package's operators run by their 'torch' way, whatever the config or
    the environment says, and attention by its formula, so that a count
    belongs to the method and to no machine.

    Args:
        model (nn.Module): The model that runs inside the context.
    """
    changed = []
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in DEFORMABLE:
            changed.append((module, 'forward'))
            module.forward = partial(deformable_convolution, module)
        if kind.__module__.startswith('lors_plugin.') and isinstance(
            vars(module).get('backend'), str
        ):
            changed.append((module, 'backend', module.backend))
            module.backend = 'torch'
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, name, *before in changed:
            delattr(module, name)
            for value in before:
                setattr(module, name, value)
