"""Counting what a forward pass computes, operator by operator."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .formulas import (
    elementwise_results,
    has_formula,
    may_multiply,
    multiply_adds,
)
from .memory import LiveMemory, storages_of
from .stand_ins import counted_modules

# Multiply-adds that a module does with pointwise operators: the learned
# scale of the overlap of each head and pair of boxes, added to the logits.
_MODULES = dict(
    BoxSelfAttention=lambda m, query, overlap: m.num_heads * overlap.numel()
)


class OperatorCounter:
    """Count the operators that run inside the context.

    What an operator does belongs to the parameter that it takes or else to
    the module whose ``forward`` calls it; see also
    :func:`lors_plugin.analysis.stand_ins.counted_modules`.

    Args:
        model (nn.Module): The model that runs inside the context.

    Attributes:
        multiply_adds (Counter): By the name of a parameter or module.
        elementwise (Counter): Results of norms, activations, additions and
            the like, by the name of a module.
        uses (dict[str, set]): Calls of modules that used a parameter.
        uncounted (Counter): Operators that are neither of the two.
        memory (LiveMemory): Of all tensors made inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.multiply_adds: Counter = Counter()
        self.elementwise: Counter = Counter()
        self.uses: dict[str, set] = defaultdict(set)
        self.uncounted: Counter = Counter()
        self.memory = LiveMemory(model)
        self._weights = storages_of(model)
        self._running: list[tuple[str, int]] = [('', 0)]
        self._calls = 0
        self._outside: Optional[ExitStack] = None

    def __enter__(self) -> 'OperatorCounter':
        self._outside = ExitStack()
        self._outside.enter_context(counted_modules(self.model))
        for name, module in self.model.named_modules():
            for handle in (
                module.register_forward_pre_hook(self._enter_module(name)),
                module.register_forward_hook(self._leave_module),
            ):
                self._outside.callback(handle.remove)
        self._outside.enter_context(_Watch(self._count))
        return self

    def __exit__(self, *error: Any) -> None:
        self._outside.close()

    def _enter_module(self, name):
        def hook(module, args):
            self._calls += 1
            self._running.append((name, self._calls))

        return hook

    def _leave_module(self, module, args, out):
        name, _ = self._running.pop()
        formula = _MODULES.get(type(module).__name__)
        if formula is not None:
            self.multiply_adds[name] += formula(module, *args)

    def _count(self, func, args, kwargs, out) -> None:
        """See one call of an operator."""
        module, call = self._running[-1]
        self.memory.track(out)
        if _is_view(func):
            return
        names = [self._name(tensor) for tensor in tree_leaves((args, kwargs))]
        names = [name for name in names if name]
        for name in names:
            self.uses[name].add(call)
        number = elementwise_results(func, args, out)
        self.elementwise[module] += number
        if has_formula(func):
            # A bias comes before the weight in `addmm`, behind it elsewhere.
            weights = (n for n in names if 'bias' not in n)
            ours = func.namespace == 'lors_plugin'
            owner = module if ours else next(weights, module)
            for kind, count in multiply_adds(func, args, kwargs, out).items():
                where = f'{module}.{kind}'.lstrip('.') if kind else owner
                self.multiply_adds[where] += count
        elif not number and may_multiply(func):
            self.uncounted[func._schema.name] += 1

    def _name(self, tensor) -> Optional[str]:
        if not isinstance(tensor, Tensor):
            return None
        return self._weights.get(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Tell a function of each operator that runs."""

    def __init__(self, tell: Callable) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == 'prim':  # asks for the device of a tensor
            return func(*args, **kwargs)
        if _is_composite(func) and not has_formula(func):
            # Composite ones stay whole where no gradients are recorded.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.tell(func, args, kwargs, out)
        return out


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), 'CompositeImplicitAutograd'
    )


@functools.cache
def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )
