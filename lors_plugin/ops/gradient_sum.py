"""One gradient of a weight that several calls use, added up in place.

Autograd lets each call make a gradient of its own and adds them up. For a
large weight, fresh memory and the sum cost as much as the products. Here each
call also takes a *token* and returns the next one: tensors of the weight's
shape without its memory. Backward goes through the chain of tokens from the
last call to the first, and what flows along it is the sum so far, to which
each call adds its product in place.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor


class GradientSum:
    """The chain of tokens of one weight through one forward pass.

    It must not be kept, since the last token holds the graph, and not be used
    where a part of the pass runs again in backward.
    """

    def __init__(self) -> None:
        self._token: Optional[Tensor] = None
        self._casts: dict = {}

    @staticmethod
    def fits(weight: Tensor, *others: Optional[Tensor]) -> bool:
        """Whether the chain can be used: eager training, one type."""
        return (
            weight.requires_grad
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(t is None or t.dtype == weight.dtype for t in others)
        )

    def take(self, weight: Tensor) -> Tensor:
        """The token that the next call takes."""
        if self._token is None:
            self._token = _First.apply(weight)
        return self._token

    def give(self, token: Tensor) -> None:
        """Keep the token that a call returned."""
        self._token = token

    def cast(self, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The weight in another type, made by the first call that asks."""
        if dtype not in self._casts:
            self._casts[dtype] = make()
        return self._casts[dtype]


def new_token(like: Tensor) -> Tensor:
    """A tensor of that shape, with the memory of one number."""
    return like.new_zeros(()).expand(like.shape)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return new_token(weight)

    @staticmethod
    def backward(ctx, grad):
        # Calls may find it handier to add to its transpose.
        return grad.contiguous()
