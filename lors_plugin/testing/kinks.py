"""Gradients where a ReLU sits on its kink.

Forward values of two correct float32 programs differ by rounding, about
5e-6 here. A pre-activation smaller than that may have either sign, so one
program lets its gradient through and the other does not: the outputs agree
and the gradients differ by one element. :class:`Kinks` finds such elements
and can put chosen ones on the other side, which tells rounding from error.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lors_plugin.ops.adaptive_mixing.reference import (
    LowRank,
    adaptive_mixing_reference,
)

_OPS = torch.ops.lors_plugin
_RELUS = (
    torch.relu,
    torch.relu_,
    torch.nn.functional.relu,
    Tensor.relu,
    Tensor.relu_,
)


class Element(NamedTuple):
    """One pre-activation: size, number of the ReLU call, flat index."""

    value: float
    call: int
    index: int


class _MaskedReLU(torch.autograd.Function):
    """The values of ReLU, the gradient of a given mask."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Kinks(TorchFunctionMode):
    """Watch every ReLU while active; flip the gradient of some elements.

    Those inside of the mixing operator too: its reference shows them, and
    computes the one call of which an element is flipped.

    Args:
        width (float): How close to zero counts as on the kink.
        limit (int): How many elements to remember, the nearest ones.
        flipped (Sequence[Element]): Elements to put on the other side.
    """

    def __init__(
        self, width: float, limit: int, flipped: tuple[Element, ...] = ()
    ) -> None:
        super().__init__()
        self.width = width
        self.limit = limit
        self.flipped = flipped
        self._found: list[Element] = []
        self._calls = 0

    def nearest(self) -> list[Element]:
        """The elements within ``width`` of their kink, nearest first."""
        return sorted(self._found)[: self.limit]

    def _remember(self, x: Tensor, call: int) -> None:
        size = x.detach().flatten().abs()
        # An exact zero, as after another ReLU, is the same in any program.
        size[size == 0] = torch.inf
        values, index = size.topk(min(self.limit, len(size)), largest=False)
        self._found += [
            Element(value, call, i)
            for value, i in zip(values.tolist(), index.tolist())
            if value < self.width
        ]

    def _mix(
        self,
        func: Callable,
        args: tuple,
        x: Tensor,
        weights: Tensor,
        factors: Sequence[Optional[Tensor]],
        eps: float,
    ) -> tuple[Tensor, ...]:
        out, *rest = func(*args)
        parts = [
            None if part[0] is None else LowRank(*part)
            for part in (factors[:3], factors[3:])
        ]
        first = self._calls
        with self:
            watched = adaptive_mixing_reference(x, weights, *parts, eps)
        flipped = any(first <= e.call < self._calls for e in self.flipped)
        return (watched if flipped else out), *rest

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is _OPS.adaptive_mixing_forward.default:
            x, weights, *factors, eps, _ = args
            return self._mix(func, args, x, weights, factors, eps)
        x = args[0] if args else None
        if func not in _RELUS or not isinstance(x, Tensor):
            return func(*args, **(kwargs or {}))
        call, self._calls = self._calls, self._calls + 1
        if x.requires_grad:
            self._remember(x, call)
        flips = [e.index for e in self.flipped if e.call == call]
        if not flips:
            return func(*args, **(kwargs or {}))
        mask = x.detach().flatten() > 0
        mask[flips] = ~mask[flips]
        return _MaskedReLU.apply(x, mask.view_as(x).to(x.dtype))
