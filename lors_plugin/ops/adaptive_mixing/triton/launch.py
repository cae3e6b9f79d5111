"""Launchers of the Triton kernels of adaptive mixing.

``forward`` and ``backward`` have the signature of those in ``torch_impl.py``.
The choice of tiles and warps is a table, not an autotuner: a run is the same
everywhere, and what runs is what the compile gate has seen.
"""

from typing import Optional

import torch
from torch import Tensor

from ...backend import triton_version
from ...triton_utils import (
    block,
    capability,
    contiguous,
    dot_type,
    num_programs,
    on,
    precision,
)
from .. import LARGEST_TILE
from .backward import adaptive_mixing_bwd_kernel
from .forward import adaptive_mixing_fwd_kernel
from .forward_steps import adaptive_mixing_fwd_kernel_steps

Factors = tuple[Optional[Tensor], ...]
PROGRAMS_PER_PROCESSOR = 2
# Whether float32 products take slices of 8 numbers; 3.7 does not.
SHORT_SLICES = triton_version() >= (3, 8)


def sizes(x, weights, c_core, s_core) -> dict:
    """Return the sizes that a kernel is compiled for."""
    groups, num_points, width = x.shape[2:]
    out_points = (weights.shape[-1] - width * width) // num_points
    k_c, r_c = (0, 1) if c_core is None else c_core.shape[-3:-1]
    k_s, r_s = (0, 1) if s_core is None else s_core.shape[-3:-1]
    return dict(
        G=groups,
        P=num_points,
        C=width,
        Q=out_points,
        KC=k_c,
        RC=r_c,
        KS=k_s,
        RS=r_s,
    )


def on_chip(size: dict, dtype: torch.dtype, cap: int) -> bool:
    """Return whether forward runs on chip: half types on tensor cores."""
    return cap >= 80 and dtype != torch.float32


def config(size: dict, dtype: torch.dtype, cap: int, kernel: str) -> dict:
    """Return tiles, warps and stages of a kernel.

    Args:
        size (dict): What :func:`sizes` returns.
        dtype (torch.dtype): Type of the inputs.
        cap (int): Compute capability as 70, 80, 90.
        kernel (str): 'forward', 'steps' or 'backward'.

    Returns:
        dict: All keyword arguments of the kernel but its pointers.

    Raises:
        TypeError: If there is no kernel for the type.
        ValueError: If a tile would not fit into registers.
    """
    dot = dot_type(dtype, cap)
    width, out_points = block(size['C']), block(size['Q'])
    rows = max(width, out_points, block(size['P']))
    side_c = block(size['KC'] * size['RC'])
    side_s = block(size['KS'] * size['RS'])
    for tile in ((rows, width), (side_c, side_c), (side_s, side_s)):
        if tile[0] * tile[1] > LARGEST_TILE:
            raise ValueError(
                f'the Triton kernels hold tiles of {LARGEST_TILE} numbers, '
                f'not {tile[0]} x {tile[1]} (sizes {size}); use '
                "backend='torch'"
            )
    half = on_chip(size, dtype, cap)
    rows_at_once = 64 if half else 32
    depth = min(32, width) if half else 16
    crowded = kernel == 'backward' and cap < 80
    if crowded and SHORT_SLICES:
        # With slices of 16 numbers it spills registers there.
        depth = 8
    elif crowded:
        # So it does not, if offsets are not kept and small ranks are padded:
        # the layouts of wider tiles need fewer offsets.
        side_c, side_s = max(64, side_c), max(64, side_s)
    tiles = dict(
        size,
        BP=block(size['P']),
        BC=width,
        BQ=out_points
        if kernel == 'forward'
        else min(rows_at_once, out_points),
        BKC=side_c,
        BKS=side_s,
        BK=depth,
        DOT=dot,
        PRECISION=precision(cap) if dtype == torch.float32 else 'ieee',
        num_warps=8,
        num_stages=1,
    )
    if kernel != 'forward':
        tiles['SCRATCH'] = scratch_size(size)
        # All that eight warps may have: by itself, the assembler aims at
        # half of it for some kernels, and spills.
        tiles['maxnreg'] = 255
    if kernel == 'backward':
        tiles['FRESH'] = crowded and not SHORT_SLICES
    return tiles


def backward_type(dtype: torch.dtype, cap: int) -> torch.dtype:
    """Type in which backward reads and writes.

    Below 8.0 half types would be converted slice by slice, for which there
    are not registers enough.
    """
    return dtype if cap >= 80 else torch.float32


def scratch_size(size: dict) -> int:
    """Numbers that a program of several steps keeps between them."""
    points, width, out = size['P'], size['C'], size['Q']
    channel = 3 * points * size['KC'] * size['RC']
    spatial = 2 * points * size['KS'] * size['RS']
    total = points * width + out * (width + points) + channel + spatial
    return -(-total // 32) * 32


def rows_first(left: Optional[Tensor]) -> Optional[Tensor]:
    """Left factors side by side: (G, K, rows, r) to (G, rows, K r)."""
    return None if left is None else left.transpose(1, 2).flatten(2)


def forward(
    x: Tensor, weights: Tensor, factors: Factors, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`..op.mixing_forward`."""
    c_left, c_core, c_right, s_left, s_core, s_right = factors
    size = sizes(x, weights, c_core, s_core)
    cap = capability(x.device)
    lead = x.shape[:3]
    out = x.new_empty(*lead, size['Q'], size['C'])
    stats = x.new_empty(*lead, 4, dtype=torch.float32)
    num = lead.numel()
    args = contiguous(
        x,
        weights,
        rows_first(c_left),
        c_core,
        c_right,
        rows_first(s_left),
        s_core,
        s_right,
    )
    args = [x if arg is None else arg for arg in args]
    kernel = 'forward' if on_chip(size, x.dtype, cap) else 'steps'
    options = config(size, x.dtype, cap, kernel)
    if num == 0:
        return out, stats
    with on(x.device):
        if kernel == 'forward':
            adaptive_mixing_fwd_kernel[(num,)](
                *args, out, stats, EPS=eps, **options
            )
        else:
            programs = num_programs(num, x.device, PROGRAMS_PER_PROCESSOR)
            scratch = stats.new_empty(programs, options['SCRATCH'])
            zero = stats.new_zeros(1, dtype=torch.int32)
            adaptive_mixing_fwd_kernel_steps[(programs,)](
                *args, out, stats, scratch, num, zero, EPS=eps, **options
            )
    return out, stats


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    factors: Factors,
    stats: Tensor,
    eps: float,
) -> tuple[Optional[Tensor], ...]:
    """See :func:`..op.mixing_backward`; None for absent factors."""
    c_left, c_core, c_right, s_left, s_core, s_right = factors
    size = sizes(x, weights, c_core, s_core)
    cap = capability(x.device)
    num = x.shape[:3].numel()
    given, kind = x.dtype, backward_type(x.dtype, cap)
    tensors = contiguous(
        grad_out,
        x,
        weights,
        rows_first(c_left),
        c_core,
        c_right,
        rows_first(s_left),
        s_core,
        s_right,
    )
    grad_out, *inputs = (t if t is None else t.to(kind) for t in tensors)
    x = inputs[0]
    grads = [None if t is None else torch.empty_like(t) for t in inputs]
    for index in (2, 4, 5, 7):  # a share of each query
        if inputs[index] is not None:
            shape = inputs[index].shape
            grads[index] = x.new_empty(*x.shape[:2], *shape)
    options = config(size, x.dtype, cap, 'backward')
    if num:
        programs = num_programs(num, x.device, PROGRAMS_PER_PROCESSOR)
        scratch = x.new_empty(programs, options['SCRATCH'])
        zero = x.new_zeros(1, dtype=torch.int32)
        with on(x.device):
            adaptive_mixing_bwd_kernel[(programs,)](
                grad_out,
                *[x if t is None else t for t in inputs],
                stats.contiguous(),
                *[x if t is None else t for t in grads],
                scratch,
                num,
                zero,
                **options,
            )
    for index in (2, 4, 5, 7):
        if grads[index] is not None:
            grads[index] = grads[index].sum((0, 1))
    for index, left in ((2, c_left), (5, s_left)):
        if left is not None:
            shape = left.transpose(1, 2).shape
            grads[index] = grads[index].view(shape).transpose(1, 2)
            grads[index] = grads[index].contiguous()
    return tuple(None if grad is None else grad.to(given) for grad in grads)
