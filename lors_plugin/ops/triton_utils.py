"""Helpers of the launchers of all Triton kernels."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import tf32_allowed

_DOTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def block(size: int) -> int:
    """Side of the tile that holds ``size``; products want 16 at least."""
    return max(16, triton.next_power_of_2(size))


def capability(device: torch.device) -> int:
    """Compute capability as 70, 80, 90; 80 under the interpreter."""
    if device.type != 'cuda':
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_type(dtype: torch.dtype, cap: int) -> tl.dtype:
    """Type of the products; float32 below 8.0, where Triton lost the rest.

    Raises:
        TypeError: If there is no kernel for the type.
    """
    if dtype not in _DOTS:
        raise TypeError(
            f'the Triton kernels take {sorted(map(str, _DOTS))}, '
            f"got {dtype}; use backend='torch'"
        )
    return _DOTS[dtype] if cap >= 80 else tl.float32


def precision(cap: int) -> str:
    """Return the precision of float32 products: TF32 where PyTorch may."""
    return 'tf32' if cap >= 80 and tf32_allowed() else 'ieee'


def on(device: torch.device):
    """Context in which kernels are launched on ``device``."""
    if device.type == 'cuda':
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def num_programs(num: int, device: torch.device, per_processor: int) -> int:
    """Programs that run at a time, each of which takes several rows."""
    if device.type != 'cuda':
        return min(num, 3)  # so that the interpreter sees the loop
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num, per_processor * count)


def contiguous(*tensors: Tensor) -> list:
    """Make tensors contiguous; None stays None."""
    return [t if t is None else t.contiguous() for t in tensors]
