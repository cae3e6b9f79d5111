"""Ways to tune a model: adapters, or a choice of its own parameters."""

import inspect
from collections.abc import Callable
from typing import Any, Union

from torch import nn

from lors_plugin.utils import check_choice

from .adapter import Adapter, RepAdapter
from .lora import LoRA


def biases(host: nn.Module) -> set[str]:
    """Choose all biases (BitFit, arXiv 2106.10199)."""
    return {
        name
        for name, _ in host.named_parameters()
        if name.rpartition('.')[2].endswith('bias')
    }


def norms(host: nn.Module) -> set[str]:
    """Choose the weights and biases of all normalisations."""
    kinds = (
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
    )
    return {
        f'{name}.{key}' if name else key
        for name, module in host.named_modules()
        if isinstance(module, kinds) or 'norm' in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }


def nothing(host: nn.Module) -> set[str]:
    """Choose nothing: only what is outside of the host is trained."""
    return set()


ADAPTERS: dict[str, type[Adapter]] = {
    kind.method: kind for kind in (RepAdapter, LoRA)
}
CHILDREN = tuple(kind.child for kind in ADAPTERS.values())
SELECTIONS: dict[str, Callable[[nn.Module], set[str]]] = dict(
    bitfit=biases, norm=norms, linear_probe=nothing
)
METHODS = (*ADAPTERS, *SELECTIONS)
# What a layer says by itself.
_OF_THE_LAYER = (
    'self',
    'embed_dims',
    'channel_dim',
    'inputs',
    'in_channels',
    'out_channels',
    'kernel_size',
)


def check_options(method: str, options: dict[str, Any]) -> None:
    """Check that a method has some options.

    Raises:
        ValueError: If not.
    """
    check_choice('method', method, METHODS)
    known = []
    if method in ADAPTERS:
        parameters = inspect.signature(ADAPTERS[method].__init__).parameters
        known = [name for name in parameters if name not in _OF_THE_LAYER]
    odd = [name for name in options if name not in known]
    if odd:
        raise ValueError(
            f'method={method!r} has no option {odd[0]!r}; its options are '
            f'{known or "none"}'
        )


def build_adapter(options: dict[str, Any]) -> Adapter:
    """Build an adapter from what its ``options()`` returned."""
    options = dict(options)
    return ADAPTERS[options.pop('type', RepAdapter.method)](**options)


def is_adapter_key(key: str) -> bool:
    """Return whether an entry of a state dict belongs to an adapter."""
    return not set(CHILDREN).isdisjoint(key.split('.')[:-1])


def adapter_of(layer: nn.Module) -> Union[Adapter, None]:
    """Return the adapter that a layer has, if any."""
    for child in CHILDREN:
        adapter = layer._modules.get(child)
        if isinstance(adapter, Adapter):
            return adapter
    return None
