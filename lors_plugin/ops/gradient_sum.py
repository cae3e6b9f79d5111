"""One gradient of a weight that several calls use, added up in place.

Autograd lets each call make a gradient of its own and adds them up. For a
large weight, fresh memory and the sum cost as much as the products. Here each
call also takes a *token* and returns the next one: tensors of the weight's
shape without its memory. Backward goes through the chain of tokens from the
last call to the first, and what flows along it is the sum so far, to which
each call adds its product in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class GradientSum:
    """The chain of tokens of one weight through one forward pass.

    It must not be kept, since the last token holds the graph, and not be used
    where a part of the pass runs again in backward:
    :func:`checkpoint_with_sums` gives such a part one of its own.

    Args:
        token (Tensor, optional): Where the chain goes on. Defaults to None,
            the start.
        casts (dict, optional): The weight in other types, by type. Defaults
            to None, none yet.
    """

    def __init__(
        self, token: Optional[Tensor] = None, casts: Optional[dict] = None
    ) -> None:
        self.token = token
        self.casts = {} if casts is None else casts

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
        if self.token is None:
            self.token = _First.apply(weight)
        return self.token

    def give(self, token: Optional[Tensor]) -> None:
        """Keep the token that a call returned."""
        self.token = token

    def cast(self, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The weight in another type, made by the first call that asks."""
        if dtype not in self.casts:
            self.casts[dtype] = make()
        return self.casts[dtype]


def checkpoint_with_sums(
    function: Callable,
    *args,
    sums: Sequence[GradientSum] = (),
    preserve_rng_state: bool = True,
) -> Any:
    """Call a function now and again in backward, rather than keep what it
    needs there.

    A sum that the function closed over would hold the graph, which holds the
    function: nobody would ever free them. So tokens go in and out as
    arguments and results.

    Args:
        function (Callable): Takes ``args`` and a tuple of sums.
        sums (Sequence[GradientSum]): Go on behind the call.
        preserve_rng_state (bool): Whether anything in it is random.

    Returns:
        Any: What the function returns.
    """
    options = dict(use_reentrant=False, preserve_rng_state=preserve_rng_state)
    if torch.compiler.is_compiling():  # which sums nothing up this way
        return checkpoint(function, *args, tuple(sums), **options)
    casts = [each.casts for each in sums]

    def run(tokens, *args):
        own = tuple(map(GradientSum, tokens, casts))
        return function(*args, own), [each.token for each in own]

    tokens = [each.token for each in sums]
    out, tokens = checkpoint(run, tokens, *args, **options)
    for each, token in zip(sums, tokens):
        each.give(token)
    return out


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
