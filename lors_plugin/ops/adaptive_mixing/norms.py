"""Both norms of mixing, each with its activation."""

import functools
from typing import Optional

import torch
from torch import Tensor


class Norms:
    """Norms and activations of chunk after chunk, and their statistics.

    Queries of a chunk are ``m``, all those of a group ``n``.

    Args:
        eps (float): Added to the variances.
        in_place (bool): Whether passes that write in place beat one that
            does not, as in the cache of a CPU.
    """

    def __init__(self, eps: float, in_place: bool) -> None:
        self.eps, self.in_place = eps, in_place
        self._moments = []

    def first(self, y: Tensor) -> Tensor:
        """Norm and ReLU of products (m, P, C), in place.

        In place, results still lack the factor ``1 / deviation`` of each
        query, which :meth:`second` makes good.
        """
        if self.in_place:
            self._moments.append(_centre_relu(y))
        else:
            self._moments.append(_norm_relu(y, self.eps, y))
        return y

    def second(self, z: Tensor, out: Tensor) -> None:
        """Norm and ReLU of (m, Q, C) into ``out``; ``z`` is used up."""
        if not self.in_place:
            self._moments.append(_norm_relu(z, self.eps, out))
            return
        before = self._moments[-1][1]
        mean, var = _centre_relu(z)
        self._moments.append((mean, var))
        # z is r times what it should be, r**2 = before + eps, and
        # z / r / sqrt(var / r**2 + eps) = z / sqrt(var + eps r**2).
        rstd = before.add(self.eps).mul_(self.eps).add_(var).rsqrt_()
        torch.mul(z, rstd.unsqueeze(-1), out=out)

    def write(self, stats: Tensor) -> None:
        """Write means and reciprocal deviations.

        Args:
            stats (Tensor): Shape (n, G, 4), for chunks that came group by
                group: both numbers of the first norm, then of the second.
        """
        if not self._moments:  # no query
            return
        shape = stats.shape[1], stats.shape[0]
        mean_y, var_y, mean_z, var_z = (
            torch.cat(numbers).view(shape).T
            for moments in (self._moments[::2], self._moments[1::2])
            for numbers in zip(*moments)
        )
        if self.in_place:
            square = var_y + self.eps
            var_y = square.rsqrt()
            mean_z = mean_z * var_y
            var_z = (var_z / square + self.eps).rsqrt_()
        torch.stack([mean_y, var_y, mean_z, var_z], 2, out=stats)


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Norm over the last two dimensions; mean and rstd in float32."""
    return torch.native_layer_norm(x, x.shape[-2:], ones(x), None, eps)


def ones(x: Tensor) -> Optional[Tensor]:
    """Scale of the norm: on CPUs its type is that of the statistics."""
    if x.device.type != 'cpu' or x.dtype in (torch.float32, torch.float64):
        return None
    return _ones_of(x.shape[-2:])


@functools.lru_cache(maxsize=8)
def _ones_of(shape: tuple) -> Tensor:
    return torch.ones(shape)


def _centre_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Less the mean, then ReLU, in place; mean and variance (m, 1)."""
    flat = x.flatten(1)
    mean = flat.mean(1, keepdim=True)
    flat.sub_(mean)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat.relu_()
    return mean, norm.square_().mul_(1 / flat.shape[1])


def _norm_relu(x: Tensor, eps: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and ReLU into ``out``; mean and reciprocal deviation (m, 1)."""
    normed, mean, rstd = layer_norm(x, eps)
    torch.clamp_min(normed, 0, out=out)
    return mean.flatten(1), rstd.flatten(1)
