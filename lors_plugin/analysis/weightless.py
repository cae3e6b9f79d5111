"""Models without memory for their weights, and stand-ins for counting.

A forward pass on ``FakeTensor`` computes shapes and nothing else, so that
the largest detector is counted in a second and without memory. Unlike the
meta device it claims to be a CPU, and code that asks for the device takes
the same path as in a real run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# Factories whose values no constructor reads. Others keep their values:
# models take drop path rates from `linspace` while they are built.
_EMPTY = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_DEFORMABLE = (
    'DeformConv2d',
    'DeformConv2dPack',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
)


class EmptyWeights(TorchFunctionMode):
    """Build a model with its weights on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _EMPTY and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


class WeightlessModel:
    """A model whose weights and buffers take no memory.

    Used as a context: tensors that are made inside are fake, too.

    Args:
        model (nn.Module): Changed in place; on any device, also meta.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        # The tensors are kept, so that no other one gets the same id.
        twins: dict[int, tuple[Tensor, Tensor]] = {}
        with self.mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in twins:
                            twins[id(tensor)] = tensor, _fake(tensor)
                        tensors[name] = twins[id(tensor)][1]

    def __enter__(self) -> 'WeightlessModel':
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cpu'
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake


@contextmanager
def countable(model: nn.Module) -> Iterator[None]:
    """Run a model inside the context by operators that can be counted.

    MMCV's deformable convolutions are compiled code without shapes for
    ``FakeTensor``, and often not installed; TorchVision's operator stands in
    for them. This package's operators run by their 'torch' implementation,
    whatever the config or the environment says, and attention by its
    formula, so that a count belongs to the method and not to the machine.

    Args:
        model (nn.Module): As before after the context.
    """
    changed = []
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in _DEFORMABLE:
            changed.append((module, 'forward'))
            module.forward = partial(_deformable_convolution, module)
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


def _deformable_convolution(
    module: nn.Module,
    x: Tensor,
    offset: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
) -> Tensor:
    """Compute ``forward`` of MMCV's four deformable convolutions.

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
