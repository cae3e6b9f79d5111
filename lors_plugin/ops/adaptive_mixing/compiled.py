"""Adaptive mixing in compiled code, for float32 on CPUs.

A query's matrices, products and norms stay in the cache of the core that
works on it, from the first product to the last. Arguments and results are
those of :mod:`.fused`, which calls this where it can.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from ..bare import are_bare
from ..compiled_library import CompiledLibrary, load
from .layout import empty_as, in_groups

Factors = tuple[Optional[Tensor], ...]
# Products of larger matrices, which no core can keep, are faster in MKL.
LARGEST_SIDE = 256
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


def find_library(
    x: Tensor, out_points: int, *others: Optional[Tensor]
) -> Optional[CompiledLibrary]:
    """What mixes ``x``, None where plain PyTorch has to.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        out_points (int): ``Q``.
        others (Tensor, optional): All else that is read, but for matrices.
    """
    tensors = [x, *(t for t in others if t is not None)]
    points, width = x.shape[-2:]
    if (
        not x.numel()
        or max(width, points, out_points) > LARGEST_SIDE
        or not are_bare(tensors, (torch.float32,))
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
    work = _Work(library, x, out_points, eps, factors, in_place=in_place)
    out_n, stats_n = out.flatten(0, 1), stats.flatten(0, 1)

    def mix_group(group, channel, spatial):
        work.run(
            library.forward,
            group,
            channel=channel if in_place else _dense(channel),
            spatial=spatial if in_place else _dense(spatial),
            out=out_n[:, group],
            stats=stats_n[:, group],
        )

    for group in range(x.shape[2]):
        # Nobody here holds on to the matrices of a group.
        mix_group(group, *matrices(group))
    return out, stats


def mix_backward(
    library: CompiledLibrary,
    grad_out: Tensor,
    x: Tensor,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
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
        channel, spatial = map(_dense, matrices(group))
        work.run(
            library.backward,
            group,
            channel=channel,
            spatial=spatial,
            stats=stats_n[:, group],
            grad_out=grad_out[:, group],
            grad_x=grad_x_g[group],
            grad_channel=grad_channel[group],
            grad_spatial=grad_spatial[group],
        )
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
        in_place: bool = False,
    ) -> None:
        self._x = in_groups(x)
        queries, points, width = self._x.shape[1:]
        threads = min(torch.get_num_threads(), queries)
        lead = tuple(x.shape[:3])
        self.parts = [
            _Part(factors[:3], lead, width, width, threads, backward),
            _Part(factors[3:], lead, out_points, points, threads, backward),
        ]
        self.call = _Mixing(
            queries=queries,
            points=points,
            width=width,
            rows=out_points,
            threads=threads,
            in_place=in_place,
            eps=eps,
            channel_part=self.parts[0].call,
            spatial_part=self.parts[1].call,
        )
        size = library.scratch_floats(self.call)
        self._scratch = x.new_empty(threads, size)
        self.call.scratch = self._scratch.data_ptr()
        self.call.scratch_floats = size
        sampled, mixed = (points, width), (out_points, width)
        matrices = dict(channel=(width, width), spatial=(out_points, points))
        self._shapes = dict(
            x=sampled,
            **matrices,
            out=mixed,
            stats=(4,),
            grad_out=mixed,
            grad_x=sampled,
            **{f'grad_{name}': shape for name, shape in matrices.items()},
        )
        written = {'out', 'grad_x', 'grad_channel', 'grad_spatial'}
        self._written = written.union(matrices if in_place else ())

    def run(
        self, function: Callable[[_Mixing], None], group: int, **tensors
    ) -> None:
        """Call compiled code for a group.

        Args:
            function (Callable): Of the library.
            group (int): Which one.
            tensors (Tensor): Of the group, by their names in ``_Mixing``,
                shapes (n, ...).
        """
        self._give('x', self._x[group])
        for name, tensor in tensors.items():
            self._give(name, tensor)
        self.call.channel_part = self.parts[0].of_group(group)
        self.call.spatial_part = self.parts[1].of_group(group)
        function(self.call)

    def _give(self, name: str, tensor: Tensor) -> None:
        # Compiled code would read whatever lies there.
        shape = self.call.queries, *self._shapes[name]
        _check(name, tensor, shape)
        stride, item = tensor.stride(0), tensor[0]
        overlap = stride < item.numel() and name in self._written
        if not item.is_contiguous() or (overlap and shape[0] > 1):
            raise ValueError(
                f'{name} has gaps or overlaps: shape {shape}, strides '
                f'{tensor.stride()}'
            )
        setattr(self.call, name, tensor.data_ptr())
        setattr(self.call, f'{name}_stride', stride)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if (
        tuple(tensor.shape) != shape
        or tensor.dtype != torch.float32
        or tensor.device.type != 'cpu'
    ):
        raise ValueError(
            f'{name} must have shape {shape} in float32 on the CPU, got '
            f'{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}'
        )


class _Part:
    """A low-rank part as compiled code takes it; without factors, none.

    Args:
        factors (tuple[Tensor | None]): Left, core and right, or None.
        lead (tuple[int]): ``B, N, G``.
        rows (int): Of the matrices.
        cols (int): Of the matrices.
        threads (int): That share the queries.
        backward (bool): Whether gradients are wanted.
    """

    def __init__(
        self,
        factors: Factors,
        lead: tuple[int, int, int],
        rows: int,
        cols: int,
        threads: int,
        backward: bool,
    ) -> None:
        self.call = _LowRank()
        self._factors = factors
        self._of_groups, self._core, self._grad_core = {}, None, None
        left, core, right = factors
        if left is None or not left.numel():
            return
        groups, (num, rank) = lead[2], left.shape[1::2]
        _check('left', left, (groups, num, rows, rank))
        _check('core', core, (*lead, num, rank, rank))
        _check('right', right, (groups, num, rank, cols))
        self.call.num, self.call.rank = num, rank
        core = core.flatten(0, 1)
        if not core[0, 0].is_contiguous():
            core = core.contiguous()
        self._core, self.call.core_stride = core, core.stride(0)
        # (G, rows, K r) and (G, K r, cols).
        left = left.transpose(1, 2).flatten(2).contiguous()
        right = right.flatten(1, 2).contiguous()
        self._of_groups.update(left=left, right=right)
        if backward:
            self._grad_core = core.new_empty(core.shape)
            self.call.grad_core_stride = self._grad_core.stride(0)
            self._of_groups.update(
                right_t=right.mT.contiguous(),
                grad_left=left.new_zeros(groups, threads, *left.shape[1:]),
                grad_right=left.new_zeros(groups, threads, *right.shape[1:]),
            )

    def of_group(self, group: int) -> _LowRank:
        """Say where the factors of a group are."""
        for name, tensor in self._of_groups.items():
            setattr(self.call, name, tensor[group].data_ptr())
        if self._core is not None:
            self.call.core = self._core[:, group].data_ptr()
        if self._grad_core is not None:
            self.call.grad_core = self._grad_core[:, group].data_ptr()
        return self.call

    def grads(self) -> Factors:
        """Gradients of the three factors."""
        left, core, right = self._factors
        if self._grad_core is None:
            return tuple(
                None if t is None else t.new_zeros(t.shape)
                for t in self._factors
            )
        grad_left = self._of_groups['grad_left'].sum(1)
        grad_left = grad_left.unflatten(2, left.shape[1::2]).transpose(1, 2)
        grad_right = self._of_groups['grad_right'].sum(1)
        return (
            grad_left.contiguous(),
            self._grad_core.view(core.shape),
            grad_right.view(right.shape),
        )
