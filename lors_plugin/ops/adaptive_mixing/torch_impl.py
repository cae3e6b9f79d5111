"""Adaptive mixing in PyTorch, on any device and in any floating type.

Backward starts from the inputs and the statistics of both norms; everything
else is computed again, which costs two products and saves most of the memory.
Queries go through in chunks. On a CPU, a chunk stays in the cache, so that
nothing between the products travels to memory; on a GPU there is one chunk
per group, which bounds the memory for products and full matrices.

``n`` stands for the ``B N`` queries, ``m`` for those of a chunk.
"""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from .op import empty_by_group
from .reference import split_weights

# Inputs of one chunk per thread, which has a cache of its own; about three
# times as much is alive at a time.
CHUNK_BYTES = 2**21
MAX_THREADS = 8

Factors = tuple[Optional[Tensor], ...]
# Queries and group of a chunk.
Chunk = tuple[slice, int]


def forward(
    x: Tensor, weights: Tensor, factors: Factors, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`.op.mixing_forward`."""
    lead = x.shape[:3]
    x, weights = x.flatten(0, 1), weights.flatten(0, 1)
    channel, spatial = split_weights(weights, *x.shape[-2:])
    channel_part, spatial_part = _parts(factors)
    out = x.new_empty(*x.shape[:2], spatial.shape[2], x.shape[3])
    stats = x.new_empty(*x.shape[:2], 4, dtype=_wide(x.dtype))
    for i in _chunks(weights, x):
        y = x[i] @ _full(channel, channel_part, i)
        y, *moments_y = _norm_relu(y, eps)
        z = _full(spatial, spatial_part, i) @ y
        out[i], *moments_z = _norm_relu(z, eps)
        stats[i] = torch.cat([*moments_y, *moments_z], dim=-1).flatten(1)
    return out.view(*lead, *out.shape[2:]), stats.view(*lead, 4)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    factors: Factors,
    stats: Tensor,
    eps: float,
) -> tuple[Optional[Tensor], ...]:
    """See :func:`.op.mixing_backward`; None for absent factors."""
    grad_x = empty_by_group(x)
    grad_weights = weights.new_empty(weights.shape)
    sizes = x.shape[-2:]
    grad_x_n = grad_x.flatten(0, 1)
    grad_channel, grad_spatial = split_weights(
        grad_weights.flatten(0, 1), *sizes
    )
    grad_out, x, weights, stats = (
        t.flatten(0, 1) for t in (grad_out, x, weights, stats)
    )
    channel, spatial = split_weights(weights, *sizes)
    channel_part, spatial_part = _parts(factors)
    for i in _chunks(weights, x):
        # Contiguous (m, 1, 1), as the backward of the norm reads them.
        mean_y, rstd_y, mean_z, rstd_z = (
            t.contiguous() for t in stats[i][..., None, None].unbind(1)
        )
        full_channel = _full(channel, channel_part, i)
        full_spatial = _full(spatial, spatial_part, i)
        y_pre = x[i] @ full_channel
        y = _repeat_norm_relu(y_pre, mean_y, rstd_y)
        z_pre = full_spatial @ y
        z = _repeat_norm_relu(z_pre, mean_z, rstd_z)

        grad_z = _norm_relu_backward(grad_out[i], z, z_pre, mean_z, rstd_z)
        grad_full_spatial = grad_z @ y.mT
        grad_y = full_spatial.mT @ grad_z
        grad_y = _norm_relu_backward(grad_y, y, y_pre, mean_y, rstd_y)
        grad_full_channel = x[i].mT @ grad_y
        grad_x_n[i] = grad_y @ full_channel.mT

        grad_channel[i], grad_spatial[i] = grad_full_channel, grad_full_spatial
        for part, grad in (
            (channel_part, grad_full_channel),
            (spatial_part, grad_full_spatial),
        ):
            if part is not None:
                part.add_gradients(grad, i)
    grads = [
        grad
        for part in (channel_part, spatial_part)
        for grad in ((None,) * 3 if part is None else part.gradients())
    ]
    return grad_x, grad_weights, *grads


class _LowRankPart:
    """Low-rank part of one kind of matrix, formed chunk by chunk.

    Args:
        left (Tensor): Shape (G, K, rows, r).
        core (Tensor): Shape (B, N, G, K, r, r).
        right (Tensor): Shape (G, K, r, cols).
    """

    def __init__(self, left: Tensor, core: Tensor, right: Tensor) -> None:
        self._factors = left, core, right
        # All left factors side by side, (G, rows, K r).
        self._left = left.transpose(1, 2).flatten(2)
        self._core, self._right = core.flatten(0, 1), right
        wide = _wide(left.dtype)
        self._grad_left = left.new_zeros(self._left.shape, dtype=wide)
        self._grad_core = core.new_zeros(self._core.shape)
        self._grad_right = right.new_zeros(right.shape, dtype=wide)

    def add_to(self, base: Tensor, i: Chunk) -> Tensor:
        """Full matrices (m, rows, cols) from generated ones."""
        left = self._left[i[1]].expand(len(base), -1, -1)
        return torch.baddbmm(base, left, self._inner(i))

    def _inner(self, i: Chunk) -> Tensor:
        """``core_k right_k``, one below the other, (m, K r, cols)."""
        inner = torch.einsum(
            'mkab,kbc->mkac', self._core[i], self._right[i[1]]
        )
        return inner.flatten(1, 2)

    def add_gradients(self, grad: Tensor, i: Chunk) -> None:
        """Take the gradient (m, rows, cols) of a chunk's full matrices."""
        _, group = i
        core, left = self._core[i], self._left[group]
        grad_left = (grad @ self._inner(i).mT).sum(
            0, dtype=self._grad_left.dtype
        )
        self._grad_left[group] += grad_left
        grad_inner = (left.mT @ grad).unflatten(1, core.shape[1:3])
        self._grad_core[i] = torch.einsum(
            'mkac,kbc->mkab', grad_inner, self._right[group]
        )
        self._grad_right[group] += torch.einsum(
            'mkab,mkac->kbc', core, grad_inner
        )

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``left``, ``core`` and ``right``."""
        left, core, right = self._factors
        grad_left = self._grad_left.unflatten(2, left.shape[1::2])
        grad_left = grad_left.transpose(1, 2).to(left.dtype)
        return (
            grad_left.contiguous(),
            self._grad_core.view(core.shape),
            self._grad_right.to(right.dtype),
        )


def _parts(factors: Factors) -> list[Optional[_LowRankPart]]:
    return [
        None if part[0] is None else _LowRankPart(*part)
        for part in (factors[:3], factors[3:])
    ]


def _full(matrices: Tensor, part: Optional[_LowRankPart], i: Chunk) -> Tensor:
    """Matrices of a chunk with their low-rank part, (m, rows, cols)."""
    return matrices[i] if part is None else part.add_to(matrices[i], i)


def _chunks(weights: Tensor, x: Tensor) -> Iterator[Chunk]:
    """Give the chunks, one group after another.

    Args:
        weights (Tensor): Shape (n, G, C C + Q P).
        x (Tensor): Shape (n, G, P, C).
    """
    queries, groups = x.shape[:2]
    size = max(queries, 1)
    if x.device.type == 'cpu':
        numel = weights.shape[2] + x[0, 0].numel() if queries else 1
        threads = min(torch.get_num_threads(), MAX_THREADS)
        size = max(threads * CHUNK_BYTES // (numel * x.element_size()), 1)
    for group in range(groups):
        for start in range(0, queries, size):
            yield slice(start, start + size), group


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norm_relu(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last two dimensions, then ReLU.

    Returns:
        tuple[Tensor]: The result in the type of ``x``; mean and reciprocal
        standard deviation, (m, 1, 1), in float32 at least.
    """
    wide = x.to(_wide(x.dtype))
    out, mean, rstd = torch.native_layer_norm(
        wide, x.shape[-2:], None, None, eps
    )
    return out.relu_().to(x.dtype), mean, rstd


def _repeat_norm_relu(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Norm and ReLU of ``x`` with the statistics that forward computed."""
    return ((x - mean) * rstd).relu_().to(x.dtype)


def _norm_relu_backward(
    grad: Tensor, out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient of ``x`` from the one of ``out = relu(norm(x))``."""
    wide = grad.masked_fill(out <= 0, 0).to(mean.dtype)
    grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        wide,
        x.to(mean.dtype),
        x.shape[-2:],
        mean,
        rstd,
        None,
        None,
        [True, False, False],
    )
    return grad_x.to(grad.dtype)
