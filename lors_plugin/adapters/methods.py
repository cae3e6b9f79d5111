"""Ways to tune a model: adapters, or a choice of its own parameters."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Union

from torch import Tensor, nn

from lors_plugin.utils import check_choice, check_pattern

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
# Options that hold values of another option for some layers, as in PEFT.
PATTERNS = dict(rank_pattern='rank', alpha_pattern='alpha')
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
        ValueError: If not, or if their patterns are none.
    """
    check_choice('method', method, METHODS)
    known = []
    if method in ADAPTERS:
        parameters = inspect.signature(ADAPTERS[method].__init__).parameters
        known = [name for name in parameters if name not in _OF_THE_LAYER]
        known += [name for name, of in PATTERNS.items() if of in known]
    odd = [name for name in options if name not in known]
    if odd:
        raise ValueError(
            f'method={method!r} has no option {odd[0]!r}; its options are '
            f'{known or "none"}'
        )
    for name in PATTERNS.keys() & options.keys():
        if not isinstance(options[name], dict):
            raise ValueError(
                f'{name}={options[name]!r} must be a dict of patterns and '
                f'values of {PATTERNS[name]}'
            )
        for pattern in options[name]:
            check_pattern(name, pattern)


def options_per_layer(
    method: str, names: Sequence[str], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Choose the options of each layer's adapter.

    Args:
        method (str): Name of the method.
        names (Sequence[str]): Of the layers.
        options (dict): Among them ``rank_pattern`` and ``alpha_pattern``.

    Returns:
        dict[str, dict]: Arguments for ``Adapter.for_layer``, by layer.

    Raises:
        ValueError: If a pattern fits no layer.
    """
    common = {k: v for k, v in options.items() if k not in PATTERNS}
    chosen = {name: dict(common) for name in names}
    for option in PATTERNS.keys() & options.keys():
        # The first pattern that fits counts.
        for pattern, value in reversed(options[option].items()):
            hits = [name for name in names if fits_pattern(pattern, name)]
            if not hits:
                raise ValueError(
                    f'{option}: {pattern!r} fits none of the adapted layers, '
                    f'which are like {list(names)[-2:]}'
                )
            for name in hits:
                chosen[name][PATTERNS[option]] = value
    return chosen


def fits_pattern(pattern: str, name: str) -> bool:
    """Return whether a pattern fits the end of a name, as PEFT has it."""
    return re.match(rf'(.*\.)?({pattern})$', name) is not None


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


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and persistent buffers by the names of their modules.

    Unlike those of ``state_dict()``, which wrappers of the hosts rename
    (``TimmClassifier``, ``HuggingFaceClassifier``).
    """
    entries = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, value in module._buffers.items():
            kept = key not in module._non_persistent_buffers_set
            if value is not None and kept:
                entries[f'{prefix}.{key}' if prefix else key] = value
    return {key: value.detach() for key, value in entries.items()}


def names_in_files(model: nn.Module) -> dict[str, str]:
    """Map the names of :func:`entries_of` to those of ``state_dict()``."""
    found: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        found.setdefault(id(value), []).append(key)
    names = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for key in entries_of(model):
        others = found.get(id(tensors[key]))
        names[key] = others.pop(0) if others else key
    return names
