"""Deploy a trained model: merged weights and the config that builds it."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lors_plugin.adapters.methods import CHILDREN
from lors_plugin.build import (
    STRUCTURE_HOOKS,
    build_model,
    without_adapters,
    without_pretrained,
)
from lors_plugin.utils import type_name

from .reparameterize import MergeError, reparameterize

PLUGIN = 'lors_plugin'
# Hooks for training alone, which would change the model again.
_DROPPED_HOOKS = (*STRUCTURE_HOOKS, 'FreezeHook')
# Types of the hosts for types of this package, and options they lack.
_HOST_TYPES = {
    'CocoMetric': ('mmdet.CocoMetric', ('backend',)),
    'AutocastOptimWrapper': ('AmpOptimWrapper', ()),
    'ShardedOptimWrapper': ('OptimWrapper', ()),
}
# Entries of `meta` that no longer hold.
_DROPPED_META = ('cfg', 'config', 'hook_msgs', 'lors_plugin_adapter')
_NOTHING = object()


@dataclass
class Deployed:
    """A merged model, ready to be written.

    Attributes:
        model (nn.Module): Built from ``cfg``, its weights loaded strictly.
        cfg (Config): The config of the merged model.
        state (dict[str, Tensor]): Weights, in the type that was asked for.
        merged (int): Number of merged modules.
        notes (list[str]): Other changes of the config, a line each.
    """

    model: nn.Module
    cfg: Config
    state: dict
    merged: int
    notes: list

    def content(self, meta: dict) -> dict:
        """Return the content of the file.

        Args:
            meta (dict): Of the training; entries that no longer hold are
                left out.
        """
        kept = {k: v for k, v in meta.items() if k not in _DROPPED_META}
        return dict(
            meta=dict(kept, cfg=self.cfg.pretty_text), state_dict=self.state
        )


@torch.no_grad()
def deploy(
    model: nn.Module,
    cfg: Config,
    dtype: torch.dtype = torch.float32,
    allow_plain: bool = False,
) -> Deployed:
    """Merge a copy of a model and load it into the plain host.

    All is computed in float64 and rounded once.

    Args:
        model (nn.Module): As trained, in evaluation mode; not changed.
        cfg (Config): The config of its training.
        dtype (torch.dtype): Of the weights. Defaults to torch.float32.
        allow_plain (bool): Also take a model in which nothing merges, tuned
            without adapters. Defaults to False.

    Returns:
        Deployed: The merged model in float32 with weights of ``dtype``.

    Raises:
        MergeError: If nothing merges, or the host cannot hold the result.
    """
    copy = deepcopy(model).double()
    merged = reparameterize(copy)
    if not merged and not allow_plain:
        raise MergeError(
            'nothing in this model merges: it has no adapters, no '
            'convolutions with branches, no shared linear layers and no '
            'ParameterNet'
        )
    state = dict(copy.state_dict())
    new_cfg, notes = deployed_config(cfg)
    host = fit_biases(new_cfg.model, lambda: build_model(new_cfg), state)
    state = {key: _rounded(key, value, dtype) for key, value in state.items()}
    try:
        host.load_state_dict(state, strict=True)
    except RuntimeError as error:
        ours = _needs_plugin(new_cfg.model)
        needs = 'this package' if ours else 'its host'
        raise MergeError(
            f'the merged weights do not fit the model that {needs} builds '
            f'from the config without adapters: {error}'
        ) from error
    return Deployed(host.eval(), new_cfg, state, merged, notes)


def _rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.to(dtype)
    if not value.isfinite().all():
        raise MergeError(
            f'{key}: its values are too large for '
            f'{str(dtype).removeprefix("torch.")}; merge in float32'
        )
    return value


def deployed_config(cfg: Config) -> tuple[Config, list[str]]:
    """Make the config of the merged model.

    It has no adapters and no other structure that merging removes, names no
    files of pretrained weights and needs no ``_base_``. Unless the model
    itself comes from this package, it needs nothing of this package.

    Args:
        cfg (Config): Of the training.

    Returns:
        tuple: The new config, and its other changes, a line each.
    """
    new = deepcopy(cfg.to_dict() if hasattr(cfg, 'to_dict') else dict(cfg))
    model = _plain_model(without_adapters(new['model']))
    new['model'] = without_pretrained(model)
    hooks = [
        hook
        for hook in new.get('custom_hooks') or []
        if type_name(hook.get('type')) not in _DROPPED_HOOKS
    ]
    new['custom_hooks'] = hooks
    for field in ('load_from', 'resume', 'work_dir', 'launcher'):
        new.pop(field, None)
    keys = _custom_keys(new.get('optim_wrapper'))
    for key in [k for k in keys if any(child in k for child in CHILDREN)]:
        del keys[key]
    notes = []
    if not _needs_plugin(new['model']):
        new = _purged(new, '', notes)
    if not new['custom_hooks']:
        del new['custom_hooks']
    return Config(new), notes


def _plain_model(model: Any) -> Any:
    """Return a model's config with the structure left after merging."""
    if isinstance(model, (list, tuple)):
        return type(model)(_plain_model(item) for item in model)
    if not isinstance(model, dict):
        return model
    kind = str(model.get('type', ''))
    if kind == f'{PLUGIN}.LORSStack':
        return _plain_model(model['module'])
    model = {key: _plain_model(value) for key, value in model.items()}
    if kind.endswith('ParameterNet') and model.get('conv') == 'rep':
        # Merged, it is a GhostNet.
        del model['conv']
        model.pop('num_branches', None)
        model['num_experts'] = 1
    if kind.endswith('ParameterNet'):
        # Built as `reparameterize` converts it.
        model['deploy'] = True
    conv = model.get('conv_cfg')
    if isinstance(conv, dict) and conv.get('type') == f'{PLUGIN}.RepConv2d':
        model['conv_cfg'] = None
    return model


def _custom_keys(optim: Any) -> dict:
    """Return the rules of learning rates by name."""
    paramwise = (optim or {}).get('paramwise_cfg') or {}
    return paramwise.get('custom_keys') or {}


def _needs_plugin(value: Any) -> bool:
    """Return whether a config names anything of this package."""
    if isinstance(value, dict):
        return any(_needs_plugin(x) for pair in value.items() for x in pair)
    if isinstance(value, (list, tuple, set)):
        return any(_needs_plugin(item) for item in value)
    return isinstance(value, (str, Callable)) and PLUGIN in str(value)


def _purged(value: Any, where: str, notes: list[str]) -> Any:
    """Replace types of this package by the host's, or leave them out."""
    if isinstance(value, (list, tuple)):
        items = [
            _purged(item, f'{where}[{i}]', notes)
            for i, item in enumerate(value)
        ]
        return type(value)(item for item in items if item is not _NOTHING)
    if not isinstance(value, dict):
        if _needs_plugin(value):
            notes.append(f'{where} is left out: {value}')
            return _NOTHING
        return value
    kind = value.get('type')
    if _needs_plugin(kind):
        name = type_name(kind)
        if name not in _HOST_TYPES:
            notes.append(f'{where} is left out: {kind}')
            return _NOTHING
        host, lacking = _HOST_TYPES[name]
        value = {k: v for k, v in value.items() if k not in lacking}
        value['type'] = host
    pairs = (
        (key, _purged(item, f'{where}.{key}' if where else key, notes))
        for key, item in value.items()
    )
    return {k: v for k, v in pairs if v is not _NOTHING}


def fit_biases(
    model: dict, build: Callable[[], nn.Module], state: dict[str, Tensor]
) -> nn.Module:
    """Fit the biases that merging made into a host that has none there.

    Where the host has an option for biases (``qkv_bias=False``) it is turned
    on, and layers that need none get zeros. Where a batch normalisation
    follows, its running mean takes the bias.

    Args:
        model (dict): The model's config, changed in place.
        build (Callable): Builds the host from ``model``.
        state (dict[str, Tensor]): Merged weights, changed in place.

    Returns:
        nn.Module: The host.

    Raises:
        MergeError: If the host cannot take a bias.
    """
    host = build()
    for section, key in _bias_options(model) if _unplaced(state, host) else ():
        before = len(_unplaced(state, host))
        section[key] = True
        other = build()
        if len(_unplaced(state, other)) < before:
            _add_zeros(state, host, other)
            host = other
        else:
            section[key] = False
    for key in _unplaced(state, host):
        _into_norm(key, state, host)
    return host


def _unplaced(state: dict[str, Tensor], host: nn.Module) -> list[str]:
    """List biases of layers and attentions that the host lacks."""
    modules = dict(host.named_modules())
    found = []
    for key in state.keys() - host.state_dict().keys():
        name, _, own = key.rpartition('.')
        plain = isinstance(modules.get(name), (nn.Linear, nn.Conv2d))
        joint = isinstance(modules.get(name), nn.MultiheadAttention)
        if own == 'bias' and plain or own == 'in_proj_bias' and joint:
            found.append(key)
    return sorted(found)


def _bias_options(config: Any) -> list[tuple[dict, str]]:
    """List the entries of a config that turn biases off."""
    if isinstance(config, (list, tuple)):
        return [found for item in config for found in _bias_options(item)]
    if not isinstance(config, dict):
        return []
    found = [
        (config, key)
        for key in ('qkv_bias', 'query_bias', 'key_bias', 'value_bias', 'bias')
        if config.get(key) is False
    ]
    return found + [pair for v in config.values() for pair in _bias_options(v)]


def _add_zeros(
    state: dict[str, Tensor], before: nn.Module, after: nn.Module
) -> None:
    """Add a bias of zeros for each layer that has one now and needs none."""
    own = after.state_dict()
    for key in own.keys() - before.state_dict().keys() - state.keys():
        state[key] = torch.zeros_like(own[key])


def _into_norm(key: str, state: dict[str, Tensor], host: nn.Module) -> None:
    name = key.rpartition('.')[0]
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
    """Return the name of the batch normalisation behind a layer.

    Guessed from how the hosts build their blocks; comparing outputs verifies
    it.
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
