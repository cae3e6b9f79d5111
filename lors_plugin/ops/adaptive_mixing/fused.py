"""Adaptive mixing in plain PyTorch, with a backward of its own.

For float32 on CPUs, compiled code does the same faster where the package was
built with it, see :mod:`.compiled`; all that follows is about the rest.

Only the inputs and the statistics of both norms are kept for backward; the
rest is computed again, which costs two products and saves most of the
memory.

On a CPU, work goes through group by group in chunks of queries that stay in
the cache: nothing between the products has to travel to memory. Low-rank
parts are added to a chunk's matrices, where this costs no more than factored
products; to those that were generated for this, in place, so that backward
finds them complete. ``n`` stands for the ``B N`` queries, ``m`` for those of a
chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Optional

import torch
from torch import Tensor

from . import compiled
from .layout import empty_as, in_groups
from .low_rank_side import LowRankSide, make_side
from .norms import Norms, layer_norm, ones
from .reference import split_weights
from .workspace import Workspace

aten = torch.ops.aten
# Inputs of one chunk for each thread, which has a cache of its own; about
# three times as much is alive at a time.
CHUNK_BYTES = 2**21
MOST_THREADS = 8

Factors = tuple[Optional[Tensor], ...]


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
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    matrices = by_group(weights, *x.shape[-2:])
    return mix(x, matrices[1].shape[2], of_group(*matrices), factors, eps)


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
    factors = c_left, c_core, c_right, s_left, s_core, s_right
    sizes = x.shape[-2:]
    grad_weights = weights.new_empty(weights.shape)
    grad_x, grad_factors = mix_backward(
        grad_out,
        x,
        of_group(*by_group(weights, *sizes)),
        factors,
        stats,
        eps,
        *by_group(grad_weights, *sizes),
    )
    return grad_x, grad_weights, *grad_factors


def by_group(
    weights: Tensor, num_points: int, width: int
) -> tuple[Tensor, Tensor]:
    """Generated numbers as matrices of each group.

    Returns:
        tuple[Tensor]: Channel matrices (G, n, C, C) and spatial matrices
        (G, n, Q, P), views of dense weights.
    """
    weights = weights.contiguous().flatten(0, 1).transpose(0, 1)
    return split_weights(weights, num_points, width)


def mix(
    x: Tensor,
    out_points: int,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    factors: Factors,
    eps: float,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mix with matrices that lie group by group.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        out_points (int): ``Q``.
        matrices (Callable): Gives those of a group, which is called once
            for each in turn: channel matrices (n, C, C) and spatial ones
            (n, Q, P).
        factors (tuple[Tensor | None]): As in :func:`forward`.
        eps (float): Added to the variances.
        in_place (bool): Whether low-rank parts are added to the matrices
            where they lie. Defaults to False.

    Returns:
        tuple[Tensor]: As :func:`forward`.
    """
    library = compiled.find_library(x, out_points, *factors)
    if library is not None:
        args = x, out_points, matrices, factors, eps, in_place
        return compiled.mix(library, *args)
    lead = x.shape[:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(*lead, out_points, x.shape[-1])
    stats = x.new_empty(*lead, 4, dtype=wide)
    size = _chunk_size(x, out_points)
    work = Workspace(x, out_points, size)
    channel_side = make_side(*factors[:3], size)
    spatial_side = make_side(*factors[3:], size)
    norms = Norms(eps, x.device.type == 'cpu' and x.dtype == wide)
    x_g, out_n, stats_n = in_groups(x), out.flatten(0, 1), stats.flatten(0, 1)

    def mix_group(group: int, channel: Tensor, spatial: Tensor) -> None:
        for part in _chunks(x, size):
            x_m = x_g[group, part]
            work.start(x_m.shape[0])
            into = None if in_place else work.channel
            full = _full(channel, channel_side, group, part, into)
            y = norms.first(torch.bmm(x_m, full, out=work.y))
            into = None if in_place else work.spatial
            full = _full(spatial, spatial_side, group, part, into)
            # Products straight into a buffer with gaps run one at a time.
            product = torch.bmm(full, y, out=work.z)
            norms.second(y, product, out_n[part, group])

    for group in range(x.shape[2]):
        # Nobody here holds on to the matrices of a group.
        mix_group(group, *matrices(group))
    norms.write(stats_n)
    return out, stats


def of_group(
    channel: Sequence[Tensor], spatial: Sequence[Tensor]
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Matrices that exist, as :func:`mix` asks for them."""
    return lambda group: (channel[group], spatial[group])


def mix_backward(
    grad_out: Tensor,
    x: Tensor,
    matrices: Callable[[int], tuple[Tensor, Tensor]],
    factors: Factors,
    stats: Tensor,
    eps: float,
    grad_channel: Sequence[Tensor],
    grad_spatial: Sequence[Tensor],
    after_group: Optional[Callable[[int], None]] = None,
    complete: bool = False,
    out: Optional[Tensor] = None,
) -> tuple[Tensor, Factors]:
    """Gradients of the inputs of :func:`mix`.

    Args:
        grad_out (Tensor): Shape (B, N, G, Q, C).
        x (Tensor): As given to :func:`mix`, and what follows too.
        matrices (Callable): See ``x``.
        factors (tuple[Tensor | None]): See ``x``.
        stats (Tensor): What :func:`mix` returned.
        eps (float): Added to the variances.
        grad_channel (Sequence[Tensor]): Written: gradient of the channel
            matrices of each group.
        grad_spatial (Sequence[Tensor]): Written: gradient of the spatial
            matrices of each group.
        after_group (Callable, optional): Called with the number of a group
            when its gradients are there; the next group may overwrite them.
        complete (bool): Whether the matrices have their low-rank parts, as
            :func:`mix` leaves them in place. Defaults to False.
        out (Tensor, optional): What :func:`mix` returned, which saves its
            norm here. Defaults to None.

    Returns:
        tuple: Gradient of ``x``, and those of the factors, None for absent
        ones.
    """
    others = grad_out, stats, *factors
    library = compiled.find_library(x, grad_out.shape[3], *others)
    if library is not None:
        return compiled.mix_backward(
            library,
            grad_out,
            x,
            matrices,
            factors,
            stats,
            eps,
            grad_channel,
            grad_spatial,
            after_group,
            complete,
        )
    size = _chunk_size(x, grad_out.shape[3])
    work = Workspace(x, grad_out.shape[3], size)
    channel_side = make_side(*factors[:3], size)
    spatial_side = make_side(*factors[3:], size)
    grad_x = empty_as(x)
    x_g, grad_x_g = in_groups(x), in_groups(grad_x)
    grad_out = grad_out.contiguous().flatten(0, 1)
    out_n = None if out is None else out.flatten(0, 1)
    stats = stats.flatten(0, 1)
    for group in range(x.shape[2]):
        channel, spatial = matrices(group)
        for part in _chunks(x, size):
            x_m = x_g[group, part]
            work.start(len(x_m))
            mean_y, rstd_y, mean_z, rstd_z = (
                t.view(-1, 1, 1) for t in stats[part, group].T.contiguous()
            )
            full_c, full_s = channel[part], spatial[part]
            if not complete:
                full_c = _full(
                    channel, channel_side, group, part, work.channel
                )
                full_s = _full(
                    spatial, spatial_side, group, part, work.spatial
                )
            y_pre = torch.bmm(x_m, full_c, out=work.y_pre)
            mean_y, y = _normalize(y_pre, mean_y, rstd_y, eps, work.y)
            torch.clamp_min(y, 0, out=y)
            z_pre = torch.bmm(full_s, y, out=work.z_pre)
            if out_n is None:
                mean_z, z = _normalize(z_pre, mean_z, rstd_z, eps, work.z)
            else:
                z = out_n[part, group]
            grad_z = _relu_backward(grad_out[part, group], z, work.z)
            grad_z = _norm_backward(grad_z, z_pre, mean_z, rstd_z)
            grad_y = torch.bmm(full_s.mT, grad_z, out=work.grad_y)
            grad_y = _relu_backward(grad_y, y, grad_y)
            grad_y = _norm_backward(grad_y, y_pre, mean_y, rstd_y)
            target = grad_x_g[group, part]
            if target.is_contiguous():
                torch.bmm(grad_y, full_c.mT, out=target)
            else:  # normalised, y_pre has been used up
                target.copy_(torch.bmm(grad_y, full_c.mT, out=work.y_pre))
            for a, b, side, grad, buffer in (
                (x_m.mT, grad_y, channel_side, grad_channel, full_c),
                (grad_z, y.mT, spatial_side, grad_spatial, full_s),
            ):
                target = grad[group][part]
                if target.is_contiguous():
                    product = torch.bmm(a, b, out=target)
                else:
                    spare = work.spare(buffer)
                    product = torch.bmm(a, b, out=spare)
                    target.copy_(product)
                if side is not None:
                    side.collect(product, group, part)
        if after_group is not None:
            after_group(group)
    grads = [
        t
        for side in (channel_side, spatial_side)
        for t in ((None,) * 3 if side is None else side.grads())
    ]
    return grad_x, tuple(grads)


def _chunk_size(x: Tensor, out_points: int) -> int:
    """Queries of one group that go through at once."""
    queries = x.shape[0] * x.shape[1]
    if x.device.type != 'cpu':
        return max(queries, 1)
    points, width = x.shape[-2:]
    numbers = points * width + width**2 + out_points * points
    total = CHUNK_BYTES * min(torch.get_num_threads(), MOST_THREADS)
    return max(total // (numbers * x.element_size()), 1)


def _chunks(x: Tensor, size: int) -> Iterator[slice]:
    """Give the queries of each chunk."""
    queries = x.shape[0] * x.shape[1]
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def _full(
    matrices: Tensor,
    side: Optional[LowRankSide],
    group: int,
    part: slice,
    out: Optional[Tensor],
) -> Tensor:
    """Matrices of a chunk with their low-rank part, in place without out."""
    base = matrices[part]
    if side is None:
        return base
    return side.add_to(base, group, part, base if out is None else out)


def _normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Repeat a norm; may centre ``x`` in place.

    Returns:
        tuple[Tensor]: The mean of what ``x`` is now, and the norm.
    """
    if x.dtype == mean.dtype:
        torch.mul(x.sub_(mean), rstd, out=out)
        return torch.zeros_like(mean), out
    return mean, layer_norm(x, eps)[0]


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    return aten.native_layer_norm_backward(
        grad, x, x.shape[-2:], mean, rstd, ones(x), None, [True, False, False]
    )[0]
