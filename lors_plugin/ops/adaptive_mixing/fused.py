"""Adaptive mixing in plain PyTorch, with a backward of its own.

Only the inputs and the statistics of both norms are kept for backward; the
rest is computed again, which costs two products and saves most of the
memory. Gradients of all generated numbers go into one buffer.

On a CPU, work goes through in chunks of queries that stay in the cache:
nothing between the products has to travel to memory. Low-rank parts are
added to a chunk's matrices, where this costs no more than factored products.
"""

import itertools
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from .reference import split_weights

aten = torch.ops.aten
# Inputs of one chunk; about three times as much is alive at a time.
CHUNK_BYTES = 2**20


def forward(
    x: Tensor,
    weights: Tensor,
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mix.

    Args:
        x (Tensor): Shape (B, N, G, P, C), all tensors of one type.
        weights (Tensor): Shape (B, N, G, C C + Q P).
        c_left (Tensor, optional): Factors of the channel side, all three or
            none, shaped as in :class:`LowRank`.
        c_core (Tensor, optional): See ``c_left``.
        c_right (Tensor, optional): See ``c_left``.
        s_left (Tensor, optional): Factors of the spatial side alike.
        s_core (Tensor, optional): See ``s_left``.
        s_right (Tensor, optional): See ``s_left``.
        eps (float): Added to the variances.

    Returns:
        tuple[Tensor]: The output (B, N, G, Q, C), and the statistics
        (B, N, G, 4) in float32 or float64: mean and reciprocal standard
        deviation of both products.
    """
    lead, (points, width) = x.shape[:3], x.shape[3:]
    out_points = (weights.shape[-1] - width**2) // points
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(*lead, out_points, width)
    stats = x.new_empty(*lead, 4, dtype=wide)
    size = _chunk_size(x, weights)
    work = _Workspace(x, weights, size)
    channel_side = _side(c_left, c_core, c_right, size)
    spatial_side = _side(s_left, s_core, s_right, size)
    channel_side = _side(c_left, c_core, c_right, size)
    spatial_side = _side(s_left, s_core, s_right, size)
    # One problem a query and group from here on, `n` of them in a chunk.
    out_flat, stats_flat = out.flatten(0, 2), stats.flatten(0, 2)
    for part, (x_n, channel, spatial) in _chunks(x, weights, size):
        work.start(len(x_n))
        channel = _matrices(channel, channel_side, part, work.channel)
        spatial = _matrices(spatial, spatial_side, part, work.spatial)
        y, z = work.y, out_flat[part]
        torch.bmm(x_n, channel, out=y)
        stats_flat[part, :2] = _norm_relu_(y, eps)
        torch.bmm(spatial, y, out=z)
        stats_flat[part, 2:] = _norm_relu_(z, eps)
    return out, stats


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    c_left: Optional[Tensor],
    c_core: Optional[Tensor],
    c_right: Optional[Tensor],
    s_left: Optional[Tensor],
    s_core: Optional[Tensor],
    s_right: Optional[Tensor],
    stats: Tensor,
    eps: float,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of the inputs of :func:`forward`.

    Args:
        grad_out (Tensor): Shape (B, N, G, Q, C).
        x (Tensor): As given to :func:`forward`, and what follows too.
        weights (Tensor): See ``x``.
        c_left (Tensor, optional): See ``x``.
        c_core (Tensor, optional): See ``x``.
        c_right (Tensor, optional): See ``x``.
        s_left (Tensor, optional): See ``x``.
        s_core (Tensor, optional): See ``x``.
        s_right (Tensor, optional): See ``x``.
        stats (Tensor): What :func:`forward` returned.
        eps (float): Added to the variances.

    Returns:
        tuple[Tensor | None]: Of ``x``, ``weights`` and the six factors.
    """
    size = _chunk_size(x, weights)
    work = _Workspace(x, weights, size)
    channel_side = _side(c_left, c_core, c_right, size)
    spatial_side = _side(s_left, s_core, s_right, size)
    grad_x = x.new_empty(x.shape)
    grad_weights = weights.new_empty(weights.shape)
    grad_out = grad_out.contiguous().flatten(0, 2)
    stats = stats.flatten(0, 2)
    chunks = zip(
        _chunks(x, weights, size), _chunks(grad_x, grad_weights, size)
    )
    for (part, inputs), (_, grads) in chunks:
        x_n, channel, spatial = inputs
        mean_y, rstd_y, mean_z, rstd_z = (
            t.view(-1, 1, 1) for t in stats[part].T.contiguous()
        )
        work.start(len(x_n))
        channel = _matrices(channel, channel_side, part, work.channel)
        spatial = _matrices(spatial, spatial_side, part, work.spatial)
        y_pre = torch.bmm(x_n, channel, out=work.y_pre)
        mean_y, y = _normalize(y_pre, mean_y, rstd_y, eps, work.y)
        torch.clamp_min(y, 0, out=y)
        z_pre = torch.bmm(spatial, y, out=work.z_pre)
        mean_z, z = _centre(z_pre, mean_z, eps)

        grad_z = _relu_backward(grad_out[part], z, work.z)
        grad_z = _norm_backward(grad_z, z_pre, mean_z, rstd_z)
        grad_y = torch.bmm(spatial.mT, grad_z, out=work.grad_y)
        grad_y = _relu_backward(grad_y, y, grad_y)
        grad_y = _norm_backward(grad_y, y_pre, mean_y, rstd_y)
        torch.bmm(grad_y, channel.mT, out=grads[0])
        # Products straight into a buffer with gaps run one at a time. The
        # full matrices have been used up, and their place is in the cache.
        grad_channel = torch.bmm(x_n.mT, grad_y, out=work.channel)
        grad_spatial = torch.bmm(grad_z, y.mT, out=work.spatial)
        grads[1].copy_(grad_channel)
        grads[2].copy_(grad_spatial)
        for side, grad in (
            (channel_side, grad_channel),
            (spatial_side, grad_spatial),
        ):
            if side is not None:
                side.collect(grad, part)
    factors = [
        t
        for side in (channel_side, spatial_side)
        for t in ((None,) * 3 if side is None else side.grads())
    ]
    return grad_x, grad_weights, *factors


def _chunk_size(x: Tensor, weights: Tensor) -> int:
    """Problems that go through at once, whole queries."""
    groups = x.shape[2]
    if x.device.type != 'cpu':
        return x.shape[:3].numel()
    numbers = x.shape[2:].numel() + weights.shape[2:].numel()
    return groups * max(CHUNK_BYTES // (numbers * x.element_size()), 1)


def _chunks(
    x: Tensor, weights: Tensor, size: int
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """Give views of ``x``, ``M`` and ``S`` for each chunk."""
    points, width = x.shape[-2:]
    x = x.contiguous().flatten(0, 2)
    weights = weights.contiguous().flatten(0, 2)
    channel, spatial = split_weights(weights, points, width)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, (x[part], channel[part], spatial[part])


class _Workspace:
    """What all chunks write to: fresh memory would cost page faults.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        weights (Tensor): Shape (B, N, G, C C + Q P).
        size (int): Problems in a chunk.
    """

    def __init__(self, x: Tensor, weights: Tensor, size: int) -> None:
        self._x = x
        self._size = min(size, x.shape[:3].numel())
        points, width = x.shape[-2:]
        out_points = (weights.shape[-1] - width**2) // points
        self._shapes = dict(
            channel=(width, width),
            spatial=(out_points, points),
            y_pre=(points, width),
            y=(points, width),
            grad_y=(points, width),
            z_pre=(out_points, width),
            z=(out_points, width),
        )
        self._all = {}
        self._now = 0

    def start(self, number: int) -> None:
        """Say how many problems the next chunk has."""
        self._now = number

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._all:
            self._all[name] = self._x.new_empty(
                self._size, *self._shapes[name]
            )
        return self._all[name][: self._now]


class _Side:
    """Low-rank part of one kind of matrix, with its gradients.

    Args:
        left (Tensor): Shape (G, K, rows, r).
        core (Tensor): Shape (B, N, G, K, r, r).
        right (Tensor): Shape (G, K, r, cols).
        size (int): Problems in a chunk.
    """

    def __init__(
        self, left: Tensor, core: Tensor, right: Tensor, size: int
    ) -> None:
        self.groups, self.num, _, self.rank = left.shape
        self.core_shape, self.core = core.shape, core.flatten(0, 1)
        self.right = right
        # One left factor a problem: (n, rows, K r).
        size = min(size, core.shape[:3].numel())
        left = left.transpose(1, 2).flatten(2)
        self.left = left.repeat(size // self.groups, 1, 1)
        queries, cols = len(self.core), right.shape[-1]
        inner = core.new_empty(queries, self.groups, self.num, self.rank, cols)
        for g, k in self._pairs():
            # All queries in one product, not one small product each.
            product = self.core[:, g, k].flatten(0, 1) @ right[g, k]
            inner[:, g, k] = product.view(queries, self.rank, cols)
        # core_k right_k, one below the other: (B N G, K r, cols).
        self.inner = inner.flatten(2, 3).flatten(0, 1)
        self.grad_left = self.grad_inner = None

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return itertools.product(range(self.groups), range(self.num))

    def add_to(self, base: Tensor, part: slice, out: Tensor) -> Tensor:
        """Full matrices (n, rows, cols) from the generated ones."""
        left = self.left[: len(base)]
        return torch.baddbmm(base, left, self.inner[part], out=out)

    def collect(self, grad: Tensor, part: slice) -> None:
        """Take the gradient (n, rows, cols) of the full matrices."""
        if self.grad_inner is None:
            self.grad_inner = torch.empty_like(self.inner)
            wide = torch.promote_types(grad.dtype, torch.float32)
            self.grad_left = torch.zeros_like(self.left, dtype=wide)
        left = self.left[: len(grad)]
        torch.bmm(left.mT, grad, out=self.grad_inner[part])
        left, inner = self.grad_left[: len(grad)], self.inner[part]
        if left.dtype == grad.dtype:
            left.baddbmm_(grad, inner.mT)
        else:
            left += grad.bmm(inner.mT)

    def grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``left``, ``core`` and ``right``."""
        core, right = self.core, self.right
        if self.grad_inner is None:
            left = right.new_zeros(
                *right.shape[:2], self.left.shape[1], self.rank
            )
            return (
                left,
                core.new_zeros(self.core_shape),
                torch.zeros_like(right),
            )
        grad_core, grad_right = (
            core.new_empty(core.shape),
            right.new_empty(right.shape),
        )
        inner = self.grad_inner.view(
            len(core), self.groups, self.num, self.rank, -1
        )
        for g, k in self._pairs():
            grad = inner[:, g, k].flatten(0, 1)
            product = grad @ right[g, k].T
            grad_core[:, g, k] = product.view(-1, self.rank, self.rank)
            grad_right[g, k] = core[:, g, k].flatten(0, 1).T @ grad
        left = self.grad_left.unflatten(0, (-1, self.groups)).sum(0)
        left = left.unflatten(2, (self.num, self.rank)).transpose(1, 2)
        left = left.to(core.dtype).contiguous()
        return left, grad_core.view(self.core_shape), grad_right


def _side(left, core, right, size) -> Optional[_Side]:
    return None if left is None else _Side(left, core, right, size)


def _matrices(
    base: Tensor, side: Optional[_Side], part: slice, out: Tensor
) -> Tensor:
    return base if side is None else side.add_to(base, part, out)


def _layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Norm over the last two dimensions; mean and rstd in float32."""
    return torch.native_layer_norm(x, x.shape[-2:], _ones(x), None, eps)


def _ones(x: Tensor) -> Optional[Tensor]:
    """Scale of the norm: on CPUs its type is that of the statistics."""
    if x.device.type != 'cpu' or x.dtype in (torch.float32, torch.float64):
        return None
    return torch.ones(x.shape[-2:])


def _norm_relu_(x: Tensor, eps: float) -> Tensor:
    """Norm and ReLU in place.

    Returns:
        Tensor: Mean and reciprocal standard deviation, shape (n, 2).
    """
    if x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64):
        # In the cache, passes that write in place beat one that does not.
        flat = x.flatten(1)
        mean = flat.mean(1, keepdim=True)
        flat.sub_(mean)
        deviation = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        rstd = (deviation.square_() / flat.shape[1] + eps).rsqrt_()
        flat.mul_(rstd).relu_()
        return torch.cat([mean, rstd], 1)
    normed, mean, rstd = _layer_norm(x, eps)
    torch.clamp_min(normed, 0, out=x)
    return torch.cat([mean.flatten(1), rstd.flatten(1)], 1)


def _centre(x: Tensor, mean: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Repeat a norm as far as its sign goes; may centre ``x`` in place.

    Returns:
        tuple[Tensor]: The mean of what ``x`` is now, and numbers with the
        signs of the norm.
    """
    if x.dtype == mean.dtype:
        return torch.zeros_like(mean), x.sub_(mean)
    return mean, _layer_norm(x, eps)[0]


def _normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Repeat a norm; may centre ``x`` in place.

    Returns:
        tuple[Tensor]: The mean of what ``x`` is now, and the norm.
    """
    now, signs = _centre(x, mean, eps)
    return now, torch.mul(signs, rstd, out=out) if signs is x else signs


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    return aten.native_layer_norm_backward(
        grad, x, x.shape[-2:], mean, rstd, _ones(x), None, [True, False, False]
    )[0]
