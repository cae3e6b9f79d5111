"""Biases that merging makes, in hosts whose layers had none."""

import re
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checks import MergeError


def fit_biases(
    model: dict, build: Callable[[], nn.Module], state: dict[str, Tensor]
) -> nn.Module:
    """Find a place in the plain host for every bias of the merged weights.

    Where the host has an option for biases (``qkv_bias=False``) it is turned
    on, and layers that did not need one get zeros. Where a batch
    normalisation follows, its running mean takes the bias.

    Args:
        model (dict): The model's config, changed in place.
        build (Callable): Builds the host from ``model``.
        state (dict[str, Tensor]): Merged weights, changed in place.

    Returns:
        nn.Module: The host.

    Raises:
        MergeError: If a bias has no place.
    """
    host = build()
    for section, key in _options(model) if _homeless(state, host) else ():
        before = len(_homeless(state, host))
        section[key] = True
        other = build()
        if len(_homeless(state, other)) < before:
            _add_zeros(state, host, other)
            host = other
        else:
            section[key] = False
    for key in _homeless(state, host):
        _into_norm(key, state, host)
    return host


def _homeless(state: dict[str, Tensor], host: nn.Module) -> list[str]:
    """Biases of linear layers and convolutions that the host lacks."""
    modules = dict(host.named_modules())
    found = []
    for key in state.keys() - host.state_dict().keys():
        name, _, own = key.rpartition('.')
        plain = isinstance(modules.get(name), (nn.Linear, nn.Conv2d))
        if own == 'bias' and plain:
            found.append(key)
    return sorted(found)


def _options(config: Any) -> list[tuple[dict, str]]:
    """Places in a config that turn biases off."""
    if isinstance(config, (list, tuple)):
        return [found for item in config for found in _options(item)]
    if not isinstance(config, dict):
        return []
    found = [
        (config, key)
        for key in ('qkv_bias', 'bias')
        if config.get(key) is False
    ]
    return found + [pair for v in config.values() for pair in _options(v)]


def _add_zeros(
    state: dict[str, Tensor], before: nn.Module, after: nn.Module
) -> None:
    """A bias of zero for each layer that has one now and needs none."""
    own = after.state_dict()
    for key in own.keys() - before.state_dict().keys() - state.keys():
        state[key] = torch.zeros_like(own[key])


def _into_norm(key: str, state: dict[str, Tensor], host: nn.Module) -> None:
    name = key.removesuffix('.bias')
    norm = _norm_behind(host, name)
    if norm is None:
        raise MergeError(
            f'merging gives {name} a bias, for which {type(host).__name__} '
            'has no option, and no batch normalisation behind it could take '
            'it. Leave this layer out (exclude=[...] of the adapters)'
        )
    mean = state[f'{norm}.running_mean']
    bias = state.pop(key)
    state[f'{norm}.running_mean'] = mean - bias.to(mean.dtype)


def _norm_behind(host: nn.Module, name: str) -> Optional[str]:
    """Name of the batch normalisation that reads a layer's output.

    Told from how hosts build their blocks; whoever relies on it compares
    outputs.
    """
    prefix, _, own = name.rpartition('.')
    parent = host.get_submodule(prefix)
    norm = None
    if isinstance(parent, nn.Sequential):
        children = list(parent.named_children())
        index = [child for child, _ in children].index(own)
        norm = children[index + 1][1] if index + 1 < len(children) else None
    elif own == 'conv':
        # mmcv's ConvModule says in which order it works.
        order = getattr(parent, 'order', ('conv', 'norm'))
        if order.index('conv') < order.index('norm'):
            norm = getattr(parent, 'norm', None)
    elif match := re.fullmatch(r'conv(\d+)', own):
        norm = getattr(parent, f'norm{match[1]}', None)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return None
    child = next(n for n, m in parent.named_modules() if m is norm)
    return f'{prefix}.{child}' if prefix else child
