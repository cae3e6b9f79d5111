"""Memory for activations, in bytes."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves


def storages_of(model: nn.Module) -> dict[int, str]:
    """Names of parameters and buffers by their storage."""
    named = [*model.named_buffers(), *model.named_parameters()]
    return {t.untyped_storage()._cdata: name for name, t in named}


class SavedForBackward(saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass.

    Each storage counts once, however many operators keep it, and the
    model's own parameters and buffers do not count.

    Args:
        model (nn.Module): The model that runs inside the context.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = storages_of(model)
        self._kept: dict[int, Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def __enter__(self) -> 'SavedForBackward':
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._weights:
            self._kept[key] = tensor.detach()
        return tensor

    @property
    def total(self) -> int:
        """int: Bytes so far."""
        return sum(t.untyped_storage().nbytes() for t in self._kept.values())


class LiveMemory:
    """Bytes of the tensors that are alive, and the most there ever were."""

    def __init__(self, model: nn.Module) -> None:
        self._known = set(storages_of(model))
        self.now = 0
        self.peak = 0

    def track(self, tensors: Any) -> None:
        """Count new tensors until they are freed.

        Args:
            tensors (Any): Tensors, or any nest of them.
        """
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
