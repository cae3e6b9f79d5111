"""Build the model of a config, and learn what images it takes."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional, Union

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner.priority import get_priority
from torch import nn

from lors_plugin.adapters.hook import RepAdapterHook
from lors_plugin.config_file import find_config, read_config
from lors_plugin.lors.hook import LORSHook
from lors_plugin.registry import MODELS
from lors_plugin.structure import StructureHook
from lors_plugin.utils import type_name

DETECTOR_SHAPE = (800, 1333)
CLASSIFIER_SHAPE = (224, 224)
# By the names that configs have for them.
STRUCTURE_HOOKS: dict[str, type[StructureHook]] = {
    hook.__name__: hook for hook in (RepAdapterHook, LORSHook)
}
ADAPTED_MODEL = 'AdaptedModel'


def load_config(
    path: Union[str, Path], options: Optional[Mapping] = None
) -> Config:
    """Read a config that has a model.

    Args:
        path (str | Path): A file, or ``mmpretrain::resnet/....py`` for a
            config of an installed package.
        options (Mapping, optional): Entries to override, by dotted keys;
            see :func:`~lors_plugin.config_file.read_config`.

    Returns:
        Config: The whole config.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the config has no model.
    """
    cfg = read_config(find_config(path), options)
    if cfg.get('model') is None:
        raise ValueError(f'{path} has no model')
    return cfg


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


def without_pretrained(model: Any) -> Any:
    """Remove the files of pretrained weights from a config of a model.

    Args:
        model (dict): Config of a model, or any part of it.

    Returns:
        dict: A config without them; the given one stays as it is.
    """
    if isinstance(model, (list, tuple)):
        return type(model)(
            without_pretrained(item) for item in model if not _loads(item)
        )
    if not isinstance(model, dict):
        return model
    return {
        key: without_pretrained(value)
        for key, value in model.items()
        if not _loads(value)
        and not (key == 'pretrained' and isinstance(value, (str, bool)))
    }


def _loads(value: Any) -> bool:
    """Return whether an ``init_cfg`` loads a file."""
    kind = value.get('type') if isinstance(value, dict) else None
    return type_name(kind) in ('Pretrained', 'PretrainedInit')


def test_pipeline(cfg: Mapping) -> list[dict]:
    """Return the test pipeline of a config.

    Args:
        cfg (Config | dict): The whole config.

    Returns:
        list[dict]: That of the (first) data set inside wrappers; empty if
        there is none.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while inner := dataset.get('dataset') or dataset.get('datasets'):
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    return list(dataset.get('pipeline') or [])


def test_shape(cfg: Mapping) -> tuple[int, int]:
    """Return height and width of the images that a config tests on.

    Args:
        cfg (Config | dict): The whole config.

    Returns:
        tuple[int]: From the crop or the resizing of the test pipeline, or
        else what is usual: 800 x 1333 for detectors, 224 x 224 for others.
    """
    for step in reversed(test_pipeline(cfg)):
        size = _output_shape(step)
        if size is not None:
            return size
    detector = cfg.get('default_scope') == 'mmdet'
    return DETECTOR_SHAPE if detector else CLASSIFIER_SHAPE


# Not tests, whatever pytest makes of their names.
test_pipeline.__test__ = test_shape.__test__ = False


def _output_shape(step: Mapping) -> Optional[tuple[int, int]]:
    kind = type_name(step.get('type'))
    if kind == 'CenterCrop':
        crop = step['crop_size']
        return (crop, crop) if isinstance(crop, int) else tuple(crop)
    scale = step.get('scale')
    if kind == 'Resize' and scale:
        if isinstance(scale, int):
            return (scale, scale)
        # (width, height), or in any order where the ratio is kept.
        if step.get('keep_ratio'):
            return (min(scale), max(scale))
        return (scale[1], scale[0])
    return None


def padded_shape(model: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the image shape after padding by the data preprocessor."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    divisor = getattr(preprocessor, 'pad_size_divisor', 1) or 1
    return tuple(-(-side // divisor) * divisor for side in shape)


def image_channels(model: nn.Module) -> int:
    """Return how many channels the first convolution of a model takes.

    Args:
        model (nn.Module): A detector or a classifier.

    Returns:
        int: 1 for gray images; 3 for a model without convolutions.
    """
    for module in getattr(model, 'backbone', model).modules():
        if hasattr(module, 'in_channels') and hasattr(module, 'kernel_size'):
            return module.in_channels
    return 3


def is_detector(model: nn.Module) -> bool:
    """Return whether a model has the interface of MMDetection's detectors."""
    return any(
        kind.__module__.startswith('mmdet.') for kind in type(model).__mro__
    )
