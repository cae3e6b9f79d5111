"""Whether somebody changed a model, or looks into it."""

from itertools import chain
from operator import attrgetter, is_, methodcaller

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from lors_plugin.ops.bare import are_bare


def is_bare(x: Tensor) -> bool:
    """Whether maps are computed here and now, and nobody follows how.

    That is on a CPU in float32 or float64, without autocast, compiler,
    tracer or tensors that are more than numbers.
    """
    return (
        type(x) is Tensor
        and are_bare([x], (torch.float32, torch.float64))
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_autocast_enabled('cpu')
    )


class Snapshot:
    """The parts of a model at one moment, to tell later ones from it.

    The parts themselves, not what is in them: weights and statistics may
    change, also as a whole by ``.data``.

    Args:
        model (nn.Module): Any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        # Who watches the model as a whole sees nothing of how it computes.
        self._hooks = [
            hooks
            for part in self._modules[1:]
            for hooks in (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._backward_hooks,
                part._backward_pre_hooks,
            )
        ]
        self._owners = [
            owned
            for part in self._modules
            for owned in (part._modules, part._parameters, part._buffers)
            if owned
        ]
        self._owned = self._all_owned()
        self._numbers = [
            value
            for value in self._owned
            if isinstance(value, Tensor) and value.is_floating_point()
        ]

    def _all_owned(self) -> list:
        owned = map(methodcaller('values'), self._owners)
        return list(chain.from_iterable(owned))

    def is_current(self) -> bool:
        """Whether modules, parameters and buffers are the same objects."""
        owned = self._all_owned()
        same = len(owned) == len(self._owned)
        return same and all(map(is_, owned, self._owned))

    def is_watched(self) -> bool:
        """Whether a part has hooks or a forward of its own."""
        return (
            any(self._hooks)
            or any(
                (
                    of_all._global_forward_hooks,
                    of_all._global_forward_pre_hooks,
                    of_all._global_backward_hooks,
                    of_all._global_backward_pre_hooks,
                )
            )
            or any(['forward' in part.__dict__ for part in self._modules])
        )

    def has_type(self, dtype: torch.dtype) -> bool:
        """Whether all weights and statistics are on the CPU in this type."""
        types = set(map(attrgetter('dtype'), self._numbers))
        return types == {dtype} and self._numbers[0].is_cpu
