"""From a config to its model, and to the images that the model takes."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Optional, Union

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import type_name

DETECTOR_SHAPE = (800, 1333)
CLASSIFIER_SHAPE = (224, 224)


def load_config(
    path: Union[str, Path], options: Optional[Mapping] = None
) -> Config:
    """Read a config that has a model.

    Args:
        path (str | Path): A file, or ``mmpretrain::resnet/....py`` for a
            config of an installed package.
        options (Mapping, optional): Entries to override, by dotted keys.

    Returns:
        Config: The whole config.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the config has no model.
    """
    if '::' in str(path):
        from mmengine.hub import get_config

        cfg = get_config(str(path))
    elif Path(path).is_file():
        cfg = Config.fromfile(path)
    else:
        raise FileNotFoundError(f'there is no config {path}')
    if options:
        cfg.merge_from_dict(dict(options))
    if cfg.get('model') is None:
        raise ValueError(f'{path} has no model')
    return cfg


def build_model(cfg: Mapping) -> nn.Module:
    """Build the model of a config as the runner does, with random weights.

    Args:
        cfg (Config | dict): The whole config.

    Returns:
        nn.Module: On the CPU; no pretrained weights are loaded.
    """
    model = deepcopy(cfg['model'])
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg['data_preprocessor'])
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(model)


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
