"""Triton kernels of 3D sampling and their launchers.

They read the table of all cells that :func:`.table.make_table` makes: one row
per cell, channels last, so that a corner is one contiguous row. A program
takes a block of points of one group of one query and all levels in one pass.
Weights of levels and corners are folded in, sums are float32, nothing but the
result is written. The gradient of the points is each program's own. The
gradient of the table is left to :mod:`.level_gradients`, which sorts the
corners by row: no atomics, so the same result each time.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import triton_version
from ..triton_utils import block, dot_type, on

MAX_TILE = 4096


@triton.jit
def level_weight(b_z, b_max, STRIDE: tl.constexpr):
    """Weight of a level before the division by the sum over levels."""
    b_d = b_z - tl.log2(tl.full((), STRIDE, tl.float32))
    return tl.exp(-0.5 * b_d * b_d - b_max)


@triton.jit
def level_softmax(b_z, STRIDES: tl.constexpr):
    """Largest logit and sum of the weights over levels, (BP, ) each."""
    b_max = tl.full(b_z.shape, float('-inf'), tl.float32)
    for i in tl.static_range(len(STRIDES)):
        b_d = b_z - tl.log2(tl.full((), STRIDES[i], tl.float32))
        b_max = tl.maximum(b_max, -0.5 * b_d * b_d)
    b_sum = tl.zeros(b_z.shape, tl.float32)
    for i in tl.static_range(len(STRIDES)):
        b_sum += level_weight(b_z, b_max, STRIDES[i])
    return b_max, b_sum


@triton.jit
def locate(b_pos, size, STRIDE: tl.constexpr):
    """Index of the cell before and the share of the one after.

    Far outside, and for NaN, everything is outside; no number overflows.
    """
    b_cell = b_pos / STRIDE - 0.5
    b_cell = tl.where(b_cell > -2.0, b_cell, -2.0)
    b_cell = tl.where(b_cell < size + 1.0, b_cell, size + 1.0)
    b_floor = tl.floor(b_cell)
    return b_floor.to(tl.int32), b_cell - b_floor


@triton.jit
def read(
    p_table,  # (rows, D), moved to the first channel of the group
    row,  # first row of the map
    b_x,  # (BP, )
    b_y,  # (BP, )
    width,
    height,
    m_p,
    o_c,
    D: tl.constexpr,
    C: tl.constexpr,
):
    """Read one corner of each point, zero outside, (BP, BC)."""
    m = m_p & (b_x >= 0) & (b_x < width) & (b_y >= 0) & (b_y < height)
    o = (row + b_y.to(tl.int64) * width + b_x) * D
    p = p_table + o[:, None] + o_c[None, :]
    m = m[:, None] & (o_c < C)[None, :]
    return tl.load(p, mask=m, other=0).to(tl.float32)


@triton.jit(do_not_specialize=['num_batch', 'num_queries'])
def sampling_3d_fwd_kernel(
    p_table,  # (sum_l B H_l W_l, D)
    p_points,  # (B N G, P, 3)
    p_sizes,  # (L, 2), height and width
    p_out,  # (B N G, P, C)
    num_batch,
    num_queries,
    STRIDES: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Sample a block of points of one group of one query."""
    i_m = tl.program_id(0).to(tl.int64)
    i_b = i_m // (num_queries * G)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    m_p = o_p < P
    p_point = p_points + (i_m * P + o_p) * 3
    b_px = tl.load(p_point, mask=m_p, other=0).to(tl.float32)
    b_py = tl.load(p_point + 1, mask=m_p, other=0).to(tl.float32)
    b_z = tl.load(p_point + 2, mask=m_p, other=0).to(tl.float32)
    b_max, b_sum = level_softmax(b_z, STRIDES)
    p_table += (i_m % G) * C
    D: tl.constexpr = G * C
    b_out = tl.zeros((BP, BC), tl.float32)
    start = i_b * 0
    for i in tl.static_range(len(STRIDES)):
        height = tl.load(p_sizes + 2 * i)
        width = tl.load(p_sizes + 2 * i + 1)
        row = start + i_b * height * width
        start += height.to(tl.int64) * width * num_batch
        b_w = level_weight(b_z, b_max, STRIDES[i]) / b_sum
        b_x, b_fx = locate(b_px, width, STRIDES[i])
        b_y, b_fy = locate(b_py, height, STRIDES[i])
        for i_y in tl.static_range(2):
            for i_x in tl.static_range(2):
                b_wx = b_fx if i_x else 1.0 - b_fx
                b_wy = b_fy if i_y else 1.0 - b_fy
                b = read(
                    p_table,
                    row,
                    b_x + i_x,
                    b_y + i_y,
                    width,
                    height,
                    m_p,
                    o_c,
                    D,
                    C,
                )
                b_out += b * (b_w * b_wx * b_wy)[:, None]
    p = p_out + ((i_m * P + o_p) * C)[:, None] + o_c[None, :]
    m = m_p[:, None] & (o_c < C)[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=['num_batch', 'num_queries'])
def sampling_3d_bwd_kernel(
    p_go,  # (B N G, P, C)
    p_table,  # (sum_l B H_l W_l, D)
    p_points,  # (B N G, P, 3)
    p_sizes,  # (L, 2), height and width
    p_grad,  # (B N G, P, 3)
    num_batch,
    num_queries,
    STRIDES: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of a block of points of one group of one query."""
    i_m = tl.program_id(0).to(tl.int64)
    i_b = i_m // (num_queries * G)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    m_p = o_p < P
    p_point = p_points + (i_m * P + o_p) * 3
    b_px = tl.load(p_point, mask=m_p, other=0).to(tl.float32)
    b_py = tl.load(p_point + 1, mask=m_p, other=0).to(tl.float32)
    b_z = tl.load(p_point + 2, mask=m_p, other=0).to(tl.float32)
    b_max, b_sum = level_softmax(b_z, STRIDES)
    p_table += (i_m % G) * C
    D: tl.constexpr = G * C
    p = p_go + ((i_m * P + o_p) * C)[:, None] + o_c[None, :]
    m = m_p[:, None] & (o_c < C)[None, :]
    b_go = tl.load(p, mask=m, other=0).to(tl.float32)
    b_gx = tl.zeros((BP,), tl.float32)
    b_gy = tl.zeros((BP,), tl.float32)
    b_mean = tl.zeros((BP,), tl.float32)  # of distances to the levels
    b_value = tl.zeros((BP,), tl.float32)
    b_moment = tl.zeros((BP,), tl.float32)
    start = i_b * 0
    for i in tl.static_range(len(STRIDES)):
        height = tl.load(p_sizes + 2 * i)
        width = tl.load(p_sizes + 2 * i + 1)
        row = start + i_b * height * width
        start += height.to(tl.int64) * width * num_batch
        b_w = level_weight(b_z, b_max, STRIDES[i]) / b_sum
        b_x, b_fx = locate(b_px, width, STRIDES[i])
        b_y, b_fy = locate(b_py, height, STRIDES[i])
        b_level = tl.zeros((BP,), tl.float32)
        for i_y in tl.static_range(2):
            for i_x in tl.static_range(2):
                b = read(
                    p_table,
                    row,
                    b_x + i_x,
                    b_y + i_y,
                    width,
                    height,
                    m_p,
                    o_c,
                    D,
                    C,
                )
                b_v = tl.sum(b * b_go, 1)
                b_wx = b_fx if i_x else 1.0 - b_fx
                b_wy = b_fy if i_y else 1.0 - b_fy
                b_dx = b_v if i_x else -b_v
                b_dy = b_v if i_y else -b_v
                b_level += b_v * b_wx * b_wy
                b_gx += b_dx * b_wy * (b_w / STRIDES[i])
                b_gy += b_dy * b_wx * (b_w / STRIDES[i])
        b_d = b_z - tl.log2(tl.full((), STRIDES[i], tl.float32))
        b_mean += b_w * b_d
        b_value += b_w * b_level
        b_moment += b_w * b_level * b_d
    p = p_grad + (i_m * P + o_p) * 3
    tl.store(p, b_gx, mask=m_p)
    tl.store(p + 1, b_gy, mask=m_p)
    tl.store(p + 2, b_value * b_mean - b_moment, mask=m_p)


def config(
    num_points: int, groups: int, width: int, strides, half_backward: bool
) -> dict:
    """Return tiles, warps and constants of a kernel.

    ``half_backward`` says whether it is backward in a half type.
    """
    columns = block(width)
    rows = min(triton.next_power_of_2(num_points), max(1, 2048 // columns))
    if columns > MAX_TILE:
        raise ValueError(
            f'the Triton kernels take up to {MAX_TILE} channels per group, '
            f"got {width}; use backend='torch'"
        )
    options = dict(
        STRIDES=tuple(float(stride) for stride in strides),
        G=groups,
        P=num_points,
        C=width,
        BP=rows,
        BC=columns,
        num_warps=4,
        num_stages=1,
    )
    if half_backward and triton_version() < (3, 8):
        # By itself, the assembler aims at 96 in one case, and spills. In
        # float32, though, it spills if it is told that it has all.
        options['maxnreg'] = 255
    return options


@functools.lru_cache(maxsize=256)
def _on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Sizes as a tensor: one copy to the device, not one a launch."""
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def _launch(kernel, grad_out, table, points, sizes, strides, out):
    batch, queries, groups, num_points, _ = points.shape
    width = table.shape[1] // groups
    half_backward = grad_out is not None and table.dtype != torch.float32
    options = config(num_points, groups, width, strides, half_backward)
    dot_type(table.dtype, 80)  # whether there is a kernel
    if not out.numel():
        return out
    sizes = _on_device(tuple(sizes), table.device)
    grid = (
        batch * queries * groups,
        triton.cdiv(num_points, options['BP']),
    )
    first = [] if grad_out is None else [grad_out.contiguous()]
    with on(table.device):
        kernel[grid](
            *first,
            table.contiguous(),
            points.contiguous(),
            sizes,
            out,
            batch,
            queries,
            **options,
        )
    return out


def forward(
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Sample a table, as :func:`.table.forward`; contiguous."""
    groups = points.shape[2]
    out = table.new_empty(*points.shape[:4], table.shape[1] // groups)
    return _launch(
        sampling_3d_fwd_kernel, None, table, points, sizes, strides, out
    )


def points_gradient(
    grad_out: Tensor,
    table: Tensor,
    points: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Tensor:
    """Compute what :func:`.table.points_gradient` does."""
    out = torch.empty_like(points, memory_format=torch.contiguous_format)
    return _launch(
        sampling_3d_bwd_kernel, grad_out, table, points, sizes, strides, out
    )
