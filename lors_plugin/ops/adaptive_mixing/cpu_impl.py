"""Adaptive mixing in C++ (``csrc``), for float32 on CPUs.

A thread takes one query of one group at a time, whose matrices, products and
norms stay in the cache of its core from the first product to the last.
"""

import ctypes
import os
from typing import Optional

import torch
from torch import Tensor

from .. import cpu_library
from .op import empty_by_group
from .reference import split_weights

Factors = tuple[Optional[Tensor], ...]
# Products of larger matrices, which no core can keep, are faster in MKL.
LARGEST_SIDE = 256
_Integer, _Pointer = ctypes.c_int64, ctypes.c_void_p
_max_threads = None


def _use_one_thread() -> None:
    global _max_threads
    _max_threads = 1


# The threads of OpenMP do not survive a fork, and a child that asks for them
# waits forever.
if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(after_in_child=_use_one_thread)


class _Matrices(ctypes.Structure):
    """``Matrices`` of ``csrc/mixing.h``."""

    _fields_ = [
        ('data', _Pointer),
        ('query_stride', _Integer),
        ('group_stride', _Integer),
    ]


class _LowRank(ctypes.Structure):
    """``LowRank`` of ``csrc/mixing.h``."""

    _fields_ = [
        ('num', _Integer),
        ('rank', _Integer),
        ('core', _Matrices),
        ('grad_core', _Matrices),
        ('left', _Pointer),
        ('right', _Pointer),
        ('right_t', _Pointer),
        ('grad_left', _Pointer),
        ('grad_right', _Pointer),
    ]


class _Mixing(ctypes.Structure):
    """``Mixing`` of ``csrc/mixing.h``."""

    _fields_ = [
        ('queries', _Integer),
        ('groups', _Integer),
        ('points', _Integer),
        ('width', _Integer),
        ('rows', _Integer),
        ('threads', _Integer),
        ('eps', ctypes.c_double),
        ('x', _Matrices),
        ('channel', _Matrices),
        ('spatial', _Matrices),
        ('out', _Matrices),
        ('stats', _Matrices),
        ('grad_out', _Matrices),
        ('grad_x', _Matrices),
        ('grad_channel', _Matrices),
        ('grad_spatial', _Matrices),
        ('channel_part', _LowRank),
        ('spatial_part', _LowRank),
        ('scratch', _Pointer),
        ('scratch_floats', _Integer),
    ]


def refusal(x: Tensor, weights: Tensor) -> str:
    """Say why the sizes are not for this implementation, '' if they are.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        weights (Tensor): Shape (B, N, G, C C + Q P).
    """
    points, width = x.shape[-2:]
    out_points = (weights.shape[-1] - width**2) // points
    if max(points, width, out_points) <= LARGEST_SIDE:
        return ''
    return (
        f'the C++ code takes matrices of up to {LARGEST_SIDE} rows and '
        f'columns, too few for C {width}, P {points}, Q {out_points}'
    )


def forward(
    x: Tensor, weights: Tensor, factors: Factors, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`.op.mixing_forward`."""
    call = _Call(x, weights, factors, eps)
    out = x.new_empty(*x.shape[:3], call.rows, x.shape[4])
    stats = x.new_empty(*x.shape[:3], 4)
    call.give('out', out)
    call.give('stats', stats)
    call.run('forward')
    return out, stats


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    factors: Factors,
    stats: Tensor,
    eps: float,
) -> tuple[Optional[Tensor], ...]:
    """See :func:`.op.mixing_backward`; None for absent factors."""
    call = _Call(x, weights, factors, eps, backward=True)
    grad_x, grad_weights = empty_by_group(x), weights.new_empty(weights.shape)
    grad_channel, grad_spatial = split_weights(grad_weights, *x.shape[-2:])
    call.give('stats', stats)
    call.give('grad_out', grad_out)
    call.give('grad_x', grad_x)
    call.give('grad_channel', grad_channel)
    call.give('grad_spatial', grad_spatial)
    call.run('backward')
    return grad_x, grad_weights, *call.gradients()


class _Call:
    """Arguments of one call of the library, which it keeps alive.

    Args:
        x, weights, factors, eps: See :func:`forward`.
        backward (bool): Whether gradients are wanted. Defaults to False.

    Raises:
        RuntimeError: If there is no library.
        ValueError: If a tensor has another shape, type or device than the
            library, which does not see them, would assume.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        factors: Factors,
        eps: float,
        backward: bool = False,
    ) -> None:
        self._library = cpu_library.load()
        if self._library is None:
            raise RuntimeError(
                f'the C++ code for CPUs is not there or {cpu_library.ENV_NAME}'
                f'={cpu_library.OFF}'
            )
        batch, queries, groups, points, width = x.shape
        self._lead = batch, queries, groups
        channel, spatial = split_weights(weights, points, width)
        self.rows = spatial.shape[3]
        threads = _max_threads or torch.get_num_threads()
        self._call = _Mixing(
            queries=batch * queries,
            groups=groups,
            points=points,
            width=width,
            rows=self.rows,
            threads=max(min(threads, batch * queries), 1),
            eps=eps,
        )
        self._shapes = dict(
            x=(points, width),
            channel=(width, width),
            spatial=(self.rows, points),
            out=(self.rows, width),
            stats=(4,),
        )
        self._alive = []
        self.give('x', x)
        self.give('channel', channel)
        self.give('spatial', spatial)
        self._parts = [
            self._give_part('channel', factors[:3], backward),
            self._give_part('spatial', factors[3:], backward),
        ]

    def give(self, name: str, tensor: Tensor) -> None:
        """Hand over a tensor (B, N, G, ...) by its name in ``_Mixing``.

        What is written must be dense in its last two dimensions.
        """
        shape = self._shapes[name.removeprefix('grad_')]
        setattr(self._call, name, self._matrices(name, tensor, shape))

    def _matrices(
        self, name: str, tensor: Tensor, shape: tuple[int, ...]
    ) -> _Matrices:
        _check(name, tensor, (*self._lead, *shape))
        dense = tensor.flatten(0, 1)  # of which only what is read is copied
        if dense.numel() and not dense[0, 0].is_contiguous():
            dense = dense.contiguous()
        self._alive.append(dense)
        return _Matrices(dense.data_ptr(), *dense.stride()[:2])

    def _give_part(
        self, side: str, factors: Factors, backward: bool
    ) -> Optional[dict[str, Tensor]]:
        """Hand over a low-rank part; return the memory of its gradients."""
        left, core, right = factors
        if left is None:
            return None
        rows, cols = self._shapes[side]
        groups, (num, rank) = self._lead[2], left.shape[1::2]
        _check(f'{side} left', left, (groups, num, rows, rank))
        _check(f'{side} right', right, (groups, num, rank, cols))
        # (G, rows, K r) and (G, K r, cols).
        left = left.transpose(1, 2).flatten(2).contiguous()
        right = right.flatten(1, 2).contiguous()
        tensors, grads = dict(left=left, right=right), {}
        part = getattr(self._call, f'{side}_part')
        part.num, part.rank = (num, rank) if left.numel() else (0, 0)
        cube = num, rank, rank
        part.core = self._matrices(f'{side} core', core, cube)
        if backward:
            share = self._call.threads, groups
            grads.update(
                grad_left=left.new_zeros(*share, rows, num * rank),
                grad_right=left.new_zeros(*share, num * rank, cols),
            )
            grad_core = left.new_zeros(core.shape)
            part.grad_core = self._matrices(f'{side} core', grad_core, cube)
            tensors.update(right_t=right.mT.contiguous(), **grads)
            grads.update(grad_core=grad_core)
        for name, tensor in tensors.items():
            setattr(part, name, tensor.data_ptr())
            self._alive.append(tensor)
        return grads

    def run(self, direction: str) -> None:
        """Run 'forward' or 'backward'."""
        size = self._library.scratch_floats(self._call)
        scratch = torch.empty(self._call.threads, size)
        self._call.scratch = scratch.data_ptr()
        self._call.scratch_floats = size
        getattr(self._library, direction)(self._call)

    def gradients(self) -> list[Optional[Tensor]]:
        """Sum the shares of the threads; gradients of the six factors."""
        found = []
        for grads in self._parts:
            if grads is None:
                found += [None] * 3
                continue
            core = grads['grad_core']
            num, rank = core.shape[3:5]
            left = grads['grad_left'].sum(0).unflatten(2, (num, rank))
            right = grads['grad_right'].sum(0).unflatten(1, (num, rank))
            found += [left.transpose(1, 2).contiguous(), core, right]
        return found


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
