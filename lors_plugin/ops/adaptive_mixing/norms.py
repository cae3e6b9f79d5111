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
        # Of each chunk and norm in turn, shape (m, 1): in place, sum and
        # length of the centred vector, else mean and reciprocal deviation.
        self._moments = []
        self._sizes = None

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

    def second(self, y: Tensor, z: Tensor, out: Tensor) -> None:
        """Norm and ReLU of ``z`` (m, Q, C) into ``out``; it is used up.

        ``y`` is what :meth:`first` returned.
        """
        if not self.in_place:
            self._moments.append(_norm_relu(z, self.eps, out))
            return
        length_y = self._moments[-1][1]
        self._moments.append(_centre_relu(z))
        length_z = self._moments[-1][1]
        # z is r times what it should be, r**2 = var_y + eps, and
        # z / r / sqrt(var_z / r**2 + eps) = z / sqrt(var_z + eps r**2).
        self._sizes = size_y, size_z = y[0].numel(), z[0].numel()
        square = z.new_full((1, 1), self.eps**2)
        square = torch.addcmul(
            square, length_y, length_y, value=self.eps / size_y
        )
        rstd = square.addcmul_(length_z, length_z, value=1 / size_z).rsqrt_()
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
        numbers = [
            torch.cat(numbers).view(shape).T
            for moments in (self._moments[::2], self._moments[1::2])
            for numbers in zip(*moments)
        ]
        if self.in_place:
            numbers = self._finished(*numbers)
        torch.stack(numbers, 2, out=stats)

    def _finished(
        self, sum_y: Tensor, length_y: Tensor, sum_z: Tensor, length_z: Tensor
    ) -> list[Tensor]:
        size_y, size_z = self._sizes
        square = length_y.square().div_(size_y).add_(self.eps)
        rstd_y = square.rsqrt()
        var_z = length_z.square().div_(size_z).div_(square)
        return [
            sum_y / size_y,
            rstd_y,
            (sum_z / size_z).mul_(rstd_y),
            var_z.add_(self.eps).rsqrt_(),
        ]


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
    """Less the mean, then ReLU, in place.

    Returns:
        tuple[Tensor]: The sum, and the length of what is centred, (m, 1).
    """
    flat = x.flatten(1)
    total = flat.sum(1, keepdim=True)
    flat.sub_(total, alpha=1 / flat.shape[1])
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    flat.relu_()
    return total, length


def _norm_relu(x: Tensor, eps: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and ReLU into ``out``; mean and reciprocal deviation (m, 1)."""
    normed, mean, rstd = layer_norm(x, eps)
    torch.clamp_min(normed, 0, out=out)
    return mean.flatten(1), rstd.flatten(1)
