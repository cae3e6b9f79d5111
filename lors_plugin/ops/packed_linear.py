"""Linear layers with a weight that MKL has brought into its own order.

A product of matrices first copies blocks of both into the order in which the
processor reads them. For a large weight and some hundred rows, this copy is a
quarter of the time, and calls that share the weight need it only once.
"""

import functools
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .bare import are_bare


@functools.lru_cache(maxsize=1)
def packing_refusal() -> str:
    """Why this PyTorch cannot pack, '' if it can.

    Its operators are those of the compiler's own linear layers, without a
    public name; a small product is tried.
    """
    if not torch.backends.mkl.is_available():
        return 'PyTorch was built without MKL'
    weight, bias, x = torch.ones(2, 3), torch.ones(2), torch.ones(4, 3)
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        try:
            found = PackedLinear(weight, bias, 4)(widen(x))
        except (AttributeError, RuntimeError) as error:
            return f'its operators are missing or others: {error}'
    if not torch.equal(found, F.linear(x, weight, bias)):
        return 'its operators compute something else'
    return ''


def can_pack(weight: Tensor, rows: int) -> bool:
    """Whether a weight can be packed for products with that many rows."""
    return (
        rows > 0
        and are_bare([weight], (torch.float32,))
        and not packing_refusal()
    )


def widen(x: Tensor) -> Tensor:
    """Rows (n, in + 1) with a one behind, which takes the bias."""
    return F.pad(x, (0, 1), value=1)


class PackedLinear:
    """``linear(x, weight, bias)`` for one number of rows, without gradients.

    Args:
        weight (Tensor): Shape (out, in), see :func:`can_pack`.
        bias (Tensor, optional): Shape (out, ).
        rows (int): Of all ``x`` to come.
    """

    def __init__(
        self, weight: Tensor, bias: Optional[Tensor], rows: int
    ) -> None:
        if bias is not None:
            weight = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        self._rows = rows
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(
            weight.contiguous(), rows
        )
        # Asked for its shape alone, as long as the number of rows fits.
        self._like = weight.new_zeros(()).expand(weight.shape)

    @property
    def out_features(self) -> int:
        """int: Width of the result."""
        return len(self._like)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to :func:`widen` of rows, or to rows where there is no bias.

        Args:
            x (Tensor): Shape (rows, in + 1) or (rows, in), float32.

        Returns:
            Tensor: Shape (rows, out).

        Raises:
            ValueError: If the shape is another one.
        """
        wanted = self._rows, self._like.shape[1]
        if tuple(x.shape) != wanted:
            raise ValueError(
                f'packed for x of shape {wanted}, got {tuple(x.shape)}'
            )
        return torch.ops.mkl._mkl_linear(
            x, self._packed, self._like, None, self._rows
        )
