"""Build the model that a config describes, with what its hooks add to it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner.priority import get_priority
from torch import nn

from lors_plugin.adapters.hook import RepAdapterHook
from lors_plugin.lors.hook import LORSHook
from lors_plugin.registry import MODELS
from lors_plugin.structure import StructureHook
from lors_plugin.utils import type_name

# By the names that configs have for them.
STRUCTURE_HOOKS: dict[str, type[StructureHook]] = {
    hook.__name__: hook for hook in (RepAdapterHook, LORSHook)
}
ADAPTED_MODEL = 'AdaptedModel'


def build_model(cfg: dict, adapters: bool = True) -> nn.Module:
    """Build the model of a config as a runner changes it, untrained.

    No file of weights is read. Inside ``torch.device('meta')`` or a similar
    context the weights take no memory.

    Args:
        cfg (:obj:`Config` or dict): The whole config; it stays as it is.
        adapters (bool): False builds the base: the same model without its
            adapters. Defaults to True.

    Returns:
        nn.Module: The model, in training mode.
    """
    model = deepcopy(cfg['model'])
    if not adapters:
        model = without_adapters(model)
    preprocessor = cfg.get('data_preprocessor')
    if preprocessor is not None:
        # As a runner does.
        model.setdefault('data_preprocessor', deepcopy(preprocessor))
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        built = MODELS.build(model)
    for hook in structure_hooks(cfg):
        if adapters or not isinstance(hook, RepAdapterHook):
            hook.change(built)
    return built


def structure_hooks(cfg: dict) -> list[StructureHook]:
    """Build the hooks of a config that change the model.

    Args:
        cfg (:obj:`Config` or dict): The whole config.

    Returns:
        list[StructureHook]: In the order in which a runner calls them.
    """
    found = []
    for options in cfg.get('custom_hooks') or ():
        if isinstance(options, Hook):
            hook = options
        elif type_name(options.get('type')) in STRUCTURE_HOOKS:
            options = dict(options)
            kind = STRUCTURE_HOOKS[type_name(options.pop('type'))]
            priority = options.pop('priority', kind.priority)
            hook = kind(**options)
            hook.priority = priority
        else:
            continue
        if isinstance(hook, StructureHook):
            found.append(hook)
    return sorted(found, key=lambda hook: get_priority(hook.priority))


def without_adapters(model: Any) -> Any:
    """Replace ``AdaptedModel`` in a config of a model by its module.

    Args:
        model (dict): Config of a model, or any part of it.

    Returns:
        dict: A config of the base; the given one stays as it is.
    """
    if isinstance(model, dict):
        if type_name(model.get('type')) == ADAPTED_MODEL:
            module = without_adapters(model['module'])
            if 'data_preprocessor' in model:
                module.setdefault(
                    'data_preprocessor', model['data_preprocessor']
                )
            return module
        return type(model)(
            (key, without_adapters(value)) for key, value in model.items()
        )
    if isinstance(model, Sequence) and not isinstance(model, str):
        return type(model)(without_adapters(item) for item in model)
    return model
