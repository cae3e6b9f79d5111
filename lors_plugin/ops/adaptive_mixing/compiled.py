"""Adaptive mixing in compiled code, for float32 on CPUs.

A query's matrices, products and norms stay in the cache of the core that
works on it, from the first product to the last. Arguments and results are
those of :mod:`.fused`, which calls this where it can.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..compiled_library import CompiledLibrary, load
from .layout import empty_as, in_groups

Factors = tuple[Optional[Tensor], ...]
_Integer, _Pointer = ctypes.c_int64, ctypes.c_void_p


class _LowRank(ctypes.Structure):
    """``LowRank`` of ``csrc/mixing.h``."""

    _fields_ = [
        ('num', _Integer),
        ('rank', _Integer),
        ('left', _Pointer),
        ('core', _Pointer),
        ('core_stride', _Integer),
        ('right', _Pointer),
        ('right_t', _Pointer),
        ('grad_core', _Pointer),
        ('grad_core_stride', _Integer),
        ('grad_left', _Pointer),
        ('grad_right', _Pointer),
    ]


class _Mixing(ctypes.Structure):
    """``Mixing`` of ``csrc/mixing.h``."""

    _fields_ = [
        ('queries', _Integer),
        ('points', _Integer),
        ('width', _Integer),
        ('rows', _Integer),
        ('threads', _Integer),
        ('complete', _Integer),
        ('in_place', _Integer),
        ('eps', ctypes.c_double),
        ('x', _Pointer),
        ('x_stride', _Integer),
        ('channel', _Pointer),
        ('channel_stride', _Integer),
        ('spatial', _Pointer),
        ('spatial_stride', _Integer),
        ('out', _Pointer),
        ('out_stride', _Integer),
        ('stats', _Pointer),
        ('stats_stride', _Integer),
        ('scratch', _Pointer),
        ('scratch_floats', _Integer),
        ('grad_out', _Pointer),
        ('grad_out_stride', _Integer),
        ('grad_x', _Pointer),
        ('grad_x_stride', _Integer),
        ('grad_channel', _Pointer),
        ('grad_channel_stride', _Integer),
        ('grad_spatial', _Pointer),
        ('grad_spatial_stride', _Integer),
        ('channel_part', _LowRank),
        ('spatial_part', _LowRank),
    ]


def find_library(x: Tensor) -> Optional[CompiledLibrary]:
    """What mixes ``x``, None where plain PyTorch has to.

    Also where someone looks at the operators, to count or to trace them.
    """
    if (
        x.device.type != 'cpu'
        or x.dtype != torch.float32
        or not x.numel()
        or torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
    ):
        return None
    return load()


def mix(
    library: CompiledLibrary,
    x: Tensor,
    out_points: int,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    factors: Factors,
    eps: float,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`.fused.mix`."""
    out = x.new_empty(*x.shape[:3], out_points, x.shape[-1])
    stats = x.new_empty(*x.shape[:3], 4)
    work = _Work(library, x, out_points, eps, factors)
    work.call.in_place = in_place
    out_n, stats_n = out.flatten(0, 1), stats.flatten(0, 1)

    def mix_group(group, channel, spatial):
        if not in_place:
            channel, spatial = _dense(channel), _dense(spatial)
        work.start(group, channel, spatial, stats_n)
        work.give('out', out_n[:, group])
        library.forward(work.call)

    for group in range(x.shape[2]):
        # Nobody here holds on to the matrices of a group.
        mix_group(group, *matrices(group))
    return out, stats


def mix_backward(
    library: CompiledLibrary,
    grad_out: Tensor,
    x: Tensor,
    channel: Sequence[Tensor],
    spatial: Sequence[Tensor],
    factors: Factors,
    stats: Tensor,
    eps: float,
    grad_channel: Sequence[Tensor],
    grad_spatial: Sequence[Tensor],
    after_group: Optional[Callable[[int], None]],
    complete: bool,
) -> tuple[Tensor, Factors]:
    """See :func:`.fused.mix_backward`."""
    grad_out = grad_out.contiguous().flatten(0, 1)
    grad_x = empty_as(x)
    grad_x_g, stats_n = in_groups(grad_x), stats.contiguous().flatten(0, 1)
    work = _Work(library, x, grad_out.shape[2], eps, factors, backward=True)
    work.call.complete = complete
    for group in range(x.shape[2]):
        matrices = _dense(channel[group]), _dense(spatial[group])
        work.start(group, *matrices, stats_n)
        work.give('grad_out', grad_out[:, group])
        work.give('grad_x', grad_x_g[group])
        work.give('grad_channel', grad_channel[group])
        work.give('grad_spatial', grad_spatial[group])
        library.backward(work.call)
        if after_group is not None:
            after_group(group)
    grads = [t for part in work.parts for t in part.grads()]
    return grad_x, tuple(grads)


def _dense(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, cols), each without gaps."""
    if matrices.stride()[-2:] != (matrices.shape[-1], 1):
        return matrices.contiguous()
    return matrices


class _Work:
    """What the calls of all groups have in common."""

    def __init__(
        self,
        library: CompiledLibrary,
        x: Tensor,
        out_points: int,
        eps: float,
        factors: Factors,
        backward: bool = False,
    ) -> None:
        self.x = in_groups(x)
        queries, points, width = self.x.shape[1:]
        threads = min(torch.get_num_threads(), queries)
        self.parts = [
            _Part(*factors[:3], threads, backward),
            _Part(*factors[3:], threads, backward),
        ]
        self.call = _Mixing(
            queries=queries,
            points=points,
            width=width,
            rows=out_points,
            threads=threads,
            eps=eps,
            channel_part=self.parts[0].call,
            spatial_part=self.parts[1].call,
        )
        size = library.scratch_floats(self.call)
        self._scratch = x.new_empty(threads, size)
        self.call.scratch = self._scratch.data_ptr()
        self.call.scratch_floats = size
        self._given = {}

    def start(
        self, group: int, channel: Tensor, spatial: Tensor, stats: Tensor
    ) -> None:
        """Go to a group, of which these are the matrices.

        ``stats`` (n, G, 4) are those of all groups.
        """
        self.give('x', self.x[group])
        self.give('channel', channel)
        self.give('spatial', spatial)
        self.give('stats', stats[:, group])
        self.call.channel_part = self.parts[0].of_group(group)
        self.call.spatial_part = self.parts[1].of_group(group)

    def give(self, name: str, tensor: Tensor) -> None:
        """Hand over a tensor (n, ...), dense but for the first dimension."""
        if not tensor[0].is_contiguous():
            raise ValueError(
                f'{name} has gaps: shape {tuple(tensor.shape)}, '
                f'strides {tensor.stride()}'
            )
        self._given[name] = tensor
        setattr(self.call, name, tensor.data_ptr())
        setattr(self.call, f'{name}_stride', tensor.stride(0))


class _Part:
    """A low-rank part as compiled code takes it; without factors, none."""

    def __init__(
        self,
        left: Optional[Tensor],
        core: Optional[Tensor],
        right: Optional[Tensor],
        threads: int,
        backward: bool,
    ) -> None:
        self.call = _LowRank()
        self._factors = None if left is None else (left, core, right)
        self.empty = left is None or not left.numel()
        if self.empty:
            return
        self.call.num, self.call.rank = left.shape[1], left.shape[3]
        # (G, rows, K r) and (G, K r, cols).
        self._left = left.transpose(1, 2).flatten(2).contiguous()
        self._core = core.flatten(0, 1)
        if not self._core[0, 0].is_contiguous():
            self._core = self._core.contiguous()
        self._right = right.flatten(1, 2).contiguous()
        if backward:
            self._right_t = self._right.mT.contiguous()
            groups, *sizes = self._left.shape
            self._grad_left = left.new_zeros(groups, threads, *sizes)
            self._grad_core = core.new_empty(self._core.shape)
            sizes = self._right.shape[1:]
            self._grad_right = left.new_zeros(groups, threads, *sizes)

    def of_group(self, group: int) -> _LowRank:
        """Say where the factors of a group are."""
        if not self.empty:
            call = self.call
            call.core_stride = self._core.stride(0)
            call.core = self._core[:, group].data_ptr()
            for name, tensor in self._of_groups():
                setattr(call, name, tensor[group].data_ptr())
            if hasattr(self, '_grad_core'):
                call.grad_core = self._grad_core[:, group].data_ptr()
                call.grad_core_stride = self._grad_core.stride(0)
        return self.call

    def _of_groups(self) -> Iterator[tuple[str, Tensor]]:
        for name in ('left', 'right', 'right_t', 'grad_left', 'grad_right'):
            if hasattr(self, f'_{name}'):
                yield name, getattr(self, f'_{name}')

    def grads(self) -> Factors:
        """Gradients of the three factors."""
        if self._factors is None:
            return None, None, None
        left, core, right = self._factors
        if self.empty:
            return tuple(t.new_zeros(t.shape) for t in self._factors)
        grad_left = self._grad_left.sum(1).unflatten(2, left.shape[1::2])
        grad_right = self._grad_right.sum(1)
        return (
            grad_left.transpose(1, 2).contiguous(),
            self._grad_core.view(core.shape),
            grad_right.view(right.shape),
        )
