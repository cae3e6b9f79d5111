"""The config of a merged model: what is left to build is plain."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from mmengine.config import Config

from lors_plugin.adapters.inject import CHILD
from lors_plugin.utils import type_name

from .structure import STRUCTURE_HOOKS

PLUGIN = 'lors_plugin'
# Hooks for training alone, which would change the model again.
_DROPPED_HOOKS = (*STRUCTURE_HOOKS, 'FreezeHook')
# What the hosts have in the place of ours, and options that it lacks.
_HOST_TYPES = {
    'CocoMetric': ('mmdet.CocoMetric', ('backend',)),
    'AutocastOptimWrapper': ('AmpOptimWrapper', ()),
}


def deployed_config(cfg: Config) -> tuple[Config, list[str]]:
    """The config of the merged model.

    Without adapters and other structure that merging takes away, without
    files of pretrained weights, with every ``_base_`` in it. Unless the
    model itself comes from this package, nothing else of it is left.

    Args:
        cfg (:obj:`Config`): Of the training.

    Returns:
        tuple: The new config, and what was changed besides, a line each.
    """
    new = deepcopy(cfg.to_dict() if hasattr(cfg, 'to_dict') else dict(cfg))
    new['model'] = _without_pretrained(_plain_model(new['model']))
    hooks = [
        hook
        for hook in new.get('custom_hooks') or []
        if type_name(hook.get('type')) not in _DROPPED_HOOKS
    ]
    new['custom_hooks'] = hooks
    for field in ('load_from', 'resume', 'work_dir', 'launcher'):
        new.pop(field, None)
    keys = _custom_keys(new.get('optim_wrapper'))
    for key in [key for key in keys if CHILD in key]:
        del keys[key]
    notes = []
    if not _mentions(new['model']):
        new = _purged(new, '', notes)
    if not new['custom_hooks']:
        del new['custom_hooks']
    return Config(new), notes


def comes_from_plugin(cfg: dict) -> bool:
    """Whether the model of a config needs this package."""
    return _mentions(cfg['model'])


def _plain_model(model: Any) -> Any:
    """A model's config with the structure that is left after merging."""
    if isinstance(model, (list, tuple)):
        return type(model)(_plain_model(item) for item in model)
    if not isinstance(model, dict):
        return model
    kind = str(model.get('type', ''))
    if kind == f'{PLUGIN}.LORSStack':
        return _plain_model(model['module'])
    model = {key: _plain_model(value) for key, value in model.items()}
    if kind.endswith('ParameterNet') and model.get('conv') == 'rep':
        # Merged, its convolutions are those of a GhostNet.
        del model['conv']
        model.pop('num_branches', None)
        model['num_experts'] = 1
    conv = model.get('conv_cfg')
    if isinstance(conv, dict) and conv.get('type') == f'{PLUGIN}.RepConv2d':
        model['conv_cfg'] = None
    return model


def _without_pretrained(model: Any) -> Any:
    """A model's config that names no file of weights."""
    if isinstance(model, (list, tuple)):
        return type(model)(
            _without_pretrained(item) for item in model if not _loads(item)
        )
    if not isinstance(model, dict):
        return model
    return {
        key: _without_pretrained(value)
        for key, value in model.items()
        if not _loads(value)
        and not (key == 'pretrained' and isinstance(value, str))
    }


def _loads(value: Any) -> bool:
    """Whether an ``init_cfg`` loads a file."""
    kind = value.get('type') if isinstance(value, dict) else None
    return type_name(kind) in ('Pretrained', 'PretrainedInit')


def _custom_keys(optim: Any) -> dict:
    """Rules of learning rates by name."""
    paramwise = (optim or {}).get('paramwise_cfg') or {}
    return paramwise.get('custom_keys') or {}


def _mentions(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_mentions(x) for pair in value.items() for x in pair)
    if isinstance(value, (list, tuple, set)):
        return any(_mentions(item) for item in value)
    return isinstance(value, (str, Callable)) and PLUGIN in str(value)


def _purged(value: Any, where: str, notes: list[str]) -> Any:
    """A config without this package: the host's types, or nothing."""
    if isinstance(value, (list, tuple)):
        items = [
            _purged(item, f'{where}[{i}]', notes)
            for i, item in enumerate(value)
        ]
        return type(value)(item for item in items if item is not _NOTHING)
    if not isinstance(value, dict):
        if _mentions(value):
            notes.append(f'{where} is left out: {value}')
            return _NOTHING
        return value
    kind = value.get('type')
    if _mentions(kind):
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


_NOTHING = object()
