"""What of an adapted model is trained, and a fingerprint of all the rest.

Every entry of a state dict is one or the other: what is trained goes into an
adapter file, what is not is the base, and its fingerprint goes there too.
"""

import hashlib
from collections.abc import Iterable
from typing import Optional

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from .inject import CHILD, adapters_of


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside parallel, test-time and compiling wrappers."""
    while True:
        if is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def adapter_keys(model: nn.Module) -> set[str]:
    """Entries of the state dict that belong to adapters."""
    return {
        f'{name}.{CHILD}.{key}'
        for name, adapter in adapters_of(model).items()
        for key in adapter.state_dict()
    }


def trained_keys(model: nn.Module) -> set[str]:
    """Entries of the state dict that training changes.

    Adapters, parameters that require gradients, and buffers that go with
    them (statistics of a normalisation): a buffer follows the parameters of
    its own module or, if that has none, of the nearest one around it.

    Args:
        model (nn.Module): An adapted model, not wrapped.
    """
    adapters = adapter_keys(model)
    params = {
        name: param.requires_grad
        for name, param in model.named_parameters(remove_duplicate=False)
        if name not in adapters
    }
    trained = {name for name, trains in params.items() if trains}
    for name in model.state_dict().keys() - params.keys() - adapters:
        prefix = name
        while prefix:
            prefix = prefix.rpartition('.')[0]
            around = [
                trains
                for key, trains in params.items()
                if key.startswith(f'{prefix}.' if prefix else '')
            ]
            if around:
                if any(around):
                    trained.add(name)
                break
    return trained | adapters


def base_entries(
    state: dict[str, Tensor], left_out: Iterable[str], values: bool = True
) -> dict[str, str]:
    """Type, shape and the start of a SHA-256 of each entry of the base.

    Args:
        state (dict[str, Tensor]): A state dict.
        left_out (Iterable[str]): Its entries that are trained.
        values (bool): False leaves the SHA-256 out. Defaults to True.

    Returns:
        dict[str, str]: By name, like ``float32 (8, 4) 0123456789abcdef``.
    """
    left_out = set(left_out)
    return {
        name: _describe(name, value, values)
        for name, value in sorted(state.items())
        if name not in left_out and isinstance(value, Tensor)
    }


def digest(entries: dict[str, str]) -> str:
    """One SHA-256 for all entries of a base."""
    lines = [f'{name} {entry}\n' for name, entry in sorted(entries.items())]
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def fingerprint(
    model: nn.Module, trained: Optional[Iterable[str]] = None
) -> str:
    """SHA-256 over names, types, shapes and bits of what is not trained.

    The same with and without adapters, wrappers, and on any device.

    Args:
        model (nn.Module): Adapted or not.
        trained (Iterable[str], optional): Entries of the state dict to leave
            out: ``keys`` of an adapter file, for a model that has no
            adapters yet. By default what is trained in ``model``.
    """
    model = unwrapped(model)
    if trained is None:
        trained = trained_keys(model)
    left_out = {*trained, *adapter_keys(model)}
    return digest(base_entries(model.state_dict(), left_out))


def form_of(entry: str) -> str:
    """An entry without its SHA-256."""
    return entry[: entry.index(')') + 1]


def _describe(name: str, value: Tensor, values: bool) -> str:
    form = f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'
    if not values:
        return form
    if value.is_meta or hasattr(value, 'placements'):
        raise ValueError(
            f'{name} is sharded or on the meta device; gather or load the '
            'weights before their fingerprint is taken'
        )
    value = value.detach().cpu().contiguous()
    bits = value.reshape(-1).view(torch.uint8).numpy()
    return f'{form} {hashlib.sha256(bits).hexdigest()[:16]}'
