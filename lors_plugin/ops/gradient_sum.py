"""One gradient of a weight that several calls use, added up in place.

Autograd lets each call make a gradient of its own and adds them up. For a
large weight, fresh memory and the sum cost as much as the products. Here each
call also takes a *token* and returns the next one: tensors of the weight's
shape without its memory. Backward goes through the chain of tokens from the
last call to the first, and what flows along it is the sum so far, to which
each call adds its product in place; or calls leave the factors of their
products to :class:`Products`, and the start of the chain multiplies all of
them at once.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .memory import new_large

# Columns whose product stays in the cache until it is where it belongs.
TILE = 4096


class Products:
    """Products that make up the gradient of one weight, multiplied at once.

    Each backward pass has its own, so that passes may follow each other,
    stop half-way or run in several threads.
    """

    def __init__(self) -> None:
        self._passes = {}

    def add(
        self, small: Tensor, big: Sequence[Tensor], transposed: bool = False
    ) -> None:
        """Leave the factors of one call, in its backward pass.

        Args:
            small (Tensor): Shape (n, s), ``s`` the same for all calls.
            big (Sequence[Tensor]): Shapes (n, b), one next to another; their
                number and widths are the same for all calls.
            transposed (bool): Whether the product is ``big.T @ small``
                rather than ``small.T @ big``. Defaults to False.
        """
        number = torch._C._current_graph_task_id()
        calls = self._passes.setdefault(number, [])
        calls.append((small, big, transposed))

    def take(self) -> list:
        """What the calls of this backward pass have left."""
        return self._passes.pop(torch._C._current_graph_task_id(), [])


def multiply(
    calls: list, out: Tensor, fresh: bool, bias: Optional[Tensor]
) -> None:
    """Sum of the products of :class:`Products`, tile by tile.

    Args:
        calls (list): At least one, see :meth:`Products.take`.
        out (Tensor): Where the sum goes.
        fresh (bool): Whether it is written there, rather than added.
        bias (Tensor, optional): Written: column sums of all that is big.
    """
    out = out.T if calls[0][2] else out
    width = len(out)
    small = torch.cat([call[0] for call in calls])
    # Ones make the column sums.
    left = small.new_ones(width + (bias is not None), len(small))
    left[:width] = small.T
    start = 0
    for parts in zip(*(call[1] for call in calls)):
        for tiles in zip(*(part.split(TILE, 1) for part in parts)):
            product = left @ torch.cat(tiles)
            where = slice(start, start + product.shape[1])
            start = where.stop
            if fresh:
                out[:, where] = product[:width]
            else:
                out[:, where] += product[:width]
            if bias is not None:
                bias[where] = product[width]


class GradientSum:
    """The chain of tokens of one weight through one forward pass.

    It must not be kept, since the last token holds the graph, and not be used
    where a part of the pass runs again in backward:
    :func:`checkpoint_with_sums` gives such a part one of its own.

    Args:
        token (Tensor, optional): Where the chain goes on. Defaults to None,
            the start.
        made (dict, optional): What calls have made of the weight. Defaults
            to None, nothing yet.
        save_memory (bool): Whether memory is worth more than time. If not,
            calls may make another copy of the weight, and leave their
            products to the start of the chain, which keeps the factors of
            all calls until then. Defaults to False.
        of_chain (Products, optional): What the start of the chain will
            multiply. Defaults to None, nothing yet.
        remembered (dict, optional): What calls that will run again may
            remember until then, when nobody wants their results any more.
            Defaults to None: results are wanted each time.
    """

    def __init__(
        self,
        token: Optional[Tensor] = None,
        made: Optional[dict] = None,
        save_memory: bool = False,
        of_chain: Optional[Products] = None,
        remembered: Optional[dict] = None,
    ) -> None:
        self.token = token
        self.made = {} if made is None else made
        self.save_memory = save_memory
        self.of_chain = Products() if of_chain is None else of_chain
        self.remembered = remembered
        self._calls = 0

    @property
    def products(self) -> Optional[Products]:
        """Products, optional: Where calls may leave their factors."""
        return None if self.save_memory else self.of_chain

    @staticmethod
    def fits(weight: Tensor, *others: Optional[Tensor]) -> bool:
        """Whether the chain can be used: eager training, one type."""
        return (
            weight.requires_grad
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(t is None or t.dtype == weight.dtype for t in others)
        )

    def take(self, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """The token that the next call takes.

        Args:
            weight (Tensor): The weight that calls share, a matrix.
            bias (Tensor, optional): One value a row, whose gradient calls
                may leave to :attr:`products` as well.
        """
        if self.token is None:
            self.token = _First.apply(self.of_chain, weight, bias)
        return self.token

    def give(self, token: Optional[Tensor]) -> None:
        """Keep the token that a call returned."""
        self.token = token

    def recall(self) -> Optional[Any]:
        """What the next call remembered when it ran first, else None."""
        return self.remembered.get(self._calls)

    def remember(self, value: Any) -> None:
        """Say what the call will want to know when it runs again."""
        self.remembered[self._calls] = value
        self._calls += 1

    def make(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """What the first call that asks makes of the weight, for all."""
        if key not in self.made:
            self.made[key] = function()
        return self.made[key]


def checkpoint_with_sums(
    function: Callable,
    *args,
    sums: Sequence[GradientSum] = (),
    preserve_rng_state: bool = True,
    inner: bool = True,
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
        inner (bool): Whether the function itself keeps results of calls
            with sums for backward. If not, such calls need not compute them
            again. Defaults to True.

    Returns:
        Any: What the function returns.
    """
    options = dict(use_reentrant=False, preserve_rng_state=preserve_rng_state)
    if torch.compiler.is_compiling():  # which sums nothing up this way
        return checkpoint(function, *args, tuple(sums), **options)
    known = [
        (each.made, True, each.of_chain, None if inner else {})
        for each in sums
    ]

    def run(tokens, *args):
        own = tuple(map(GradientSum, tokens, *zip(*known)))
        return function(*args, own), [each.token for each in own]

    tokens = [each.token for each in sums]
    out, tokens = checkpoint(run, tokens, *args, **options)
    for each, token in zip(sums, tokens):
        each.give(token)
    return out


def new_token(
    like: Tensor,
    shape: Optional[Sequence[int]] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """A tensor of that shape and type, with the memory of one number."""
    token = like.new_zeros((), dtype=like.dtype if dtype is None else dtype)
    return token.expand(like.shape if shape is None else shape)


def sum_so_far(total: Optional[Tensor]) -> Optional[Tensor]:
    """What flows along the chain, None where that is only a token."""
    if total is None or total.untyped_storage().nbytes() < total.nbytes:
        return None
    return total


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products, weight, bias):
        ctx.products = products
        ctx.needs_bias = bias is not None and bias.requires_grad
        ctx.set_materialize_grads(False)
        return new_token(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        calls = ctx.products.take()
        total, bias = sum_so_far(grad), None
        if calls:
            fresh = total is None
            total = new_large(grad, grad.shape) if fresh else total
            bias = grad.new_empty(len(grad)) if ctx.needs_bias else None
            multiply(calls, total, fresh, bias)
        elif total is None:
            raise RuntimeError(
                'the calls that share a weight ran backward in another pass '
                'than the weight: what runs again in backward must go '
                'through checkpoint_with_sums()'
            )
        # Calls may find it handier to add to its transpose.
        return None, total.contiguous(), bias
