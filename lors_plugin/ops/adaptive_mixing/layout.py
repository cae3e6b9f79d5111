"""How sampled features lie in memory, and how mixing sees them."""

from torch import Tensor


def empty_as(x: Tensor) -> Tensor:
    """Memory for the gradient of ``x``, shape (B, N, G, P, C).

    One group after another if ``x`` lies so, as what sampling returns, else
    contiguous; :func:`in_groups` of it is a view either way.
    """
    by_group = x.permute(2, 0, 1, 3, 4)
    if by_group.is_contiguous():
        return x.new_empty(by_group.shape).permute(1, 2, 0, 3, 4)
    return x.new_empty(x.shape)


def in_groups(x: Tensor) -> Tensor:
    """Shape (G, n, P, C), each (P, C) dense as products need it."""
    if x.stride()[-2:] != (x.shape[-1], 1):
        x = x.contiguous()
    return x.permute(2, 0, 1, 3, 4).flatten(1, 2)
