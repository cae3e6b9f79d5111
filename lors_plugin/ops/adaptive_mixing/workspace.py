"""Memory for what exists only while a chunk of queries goes through."""

from torch import Tensor


class Workspace:
    """What all chunks write to: fresh memory would cost page faults.

    Args:
        x (Tensor): Shape (B, N, G, P, C).
        out_points (int): ``Q``.
        size (int): Queries in a chunk.
    """

    def __init__(self, x: Tensor, out_points: int, size: int) -> None:
        self._x = x
        self._size = min(size, x.shape[0] * x.shape[1])
        points, width = x.shape[-2:]
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
        """Say how many queries the next chunk has."""
        self._now = number

    def spare(self, matrices: Tensor) -> Tensor:
        """Where a product of the shape of full matrices may go.

        Full matrices that were formed here have been used up by then.
        """
        shape = matrices.shape[-2:]
        kind = 'channel' if shape == self._shapes['channel'] else 'spatial'
        return getattr(self, kind)

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._all:
            self._all[name] = self._x.new_empty(
                self._size, *self._shapes[name]
            )
        return self._all[name][: self._now]
