"""From a config to a model that can be counted."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from mmengine.registry import DefaultScope
from torch import nn

from lors_plugin.registry import MODELS

from .model_counts import ModelCounts, count_model
from .weightless import EmptyWeights, WeightlessModel

DETECTOR_SHAPE = (800, 1333)
CLASSIFIER_SHAPE = (224, 224)


class UncountableError(ValueError):
    """A model that cannot run, or not without numbers."""


@dataclass
class ConfigCounts:
    """Counts of the model of a config.

    Attributes:
        counts (ModelCounts): The counts, for the whole batch.
        shape (tuple[int]): Height and width of the images.
        padded_shape (tuple[int]): What the model gets.
    """

    counts: ModelCounts
    shape: tuple[int, int]
    padded_shape: tuple[int, int]


def count_config(
    cfg: dict,
    shape: Optional[tuple[int, int]] = None,
    batch: int = 1,
    real: bool = False,
) -> ConfigCounts:
    """Count the model of a config.

    Args:
        cfg (:obj:`Config` or dict): The whole config.
        shape (tuple[int], optional): Height and width of the images; by
            default :func:`test_shape`.
        batch (int): Number of images. Defaults to 1.
        real (bool): Whether to run it on the CPU with numbers, which models
            need whose way depends on values. Defaults to False.

    Returns:
        ConfigCounts: The counts.

    Raises:
        UncountableError: If the model cannot run that way.
    """
    shape = tuple(shape) if shape else test_shape(cfg)
    try:
        if real:
            model = build_model(cfg, empty=False)
            counts = count_model(model, make_forward(model, shape, batch))
        else:
            weightless = build_weightless(cfg)
            model = weightless.module
            with weightless:
                counts = count_model(model, make_forward(model, shape, batch))
    except (RuntimeError, NotImplementedError) as error:
        # Also what FakeTensor raises where a way depends on values.
        how = 'cannot run' if real else 'cannot run without numbers'
        kind, reason = cfg['model']['type'], str(error).split('\n')[0]
        raise UncountableError(f'{kind} {how}: {reason}') from error
    return ConfigCounts(counts, shape, padded_shape(model, shape))


def build_model(cfg: dict, empty: bool = True) -> nn.Module:
    """Build the model of a config, untrained.

    Args:
        cfg (:obj:`Config` or dict): The whole config.
        empty (bool): Whether weights may be on the meta device.

    Returns:
        nn.Module: The model.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    with DefaultScope.overwrite_default_scope(scope):
        if empty:
            with EmptyWeights():
                return MODELS.build(deepcopy(cfg['model']))
        return MODELS.build(deepcopy(cfg['model']))


def build_weightless(cfg: dict) -> WeightlessModel:
    """Build the model of a config without memory for its weights."""
    try:
        return WeightlessModel(build_model(cfg))
    except (RuntimeError, NotImplementedError):
        # It looks at values of its weights while it is built.
        return WeightlessModel(build_model(cfg, empty=False))


def test_shape(cfg: dict) -> tuple[int, int]:
    """Height and width of the images that a config tests on.

    Args:
        cfg (:obj:`Config` or dict): The whole config.

    Returns:
        tuple[int]: From the crop or the resizing of the test pipeline, or
        else what is usual: 800 x 1333 for detectors, 224 x 224 for others.
    """
    pipeline = _pipeline(cfg)
    for step in reversed(pipeline):
        size = _size_of(step)
        if size is not None:
            return size
    detector = cfg.get('default_scope') == 'mmdet'
    return DETECTOR_SHAPE if detector else CLASSIFIER_SHAPE


# Not a test, whatever its name makes of it.
test_shape.__test__ = False


def _pipeline(cfg: dict) -> list:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset.get('pipeline') or []


def _size_of(step: dict) -> Optional[tuple[int, int]]:
    kind = str(step.get('type')).rsplit('.', 1)[-1]
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
    """The shape as the model's data preprocessor pads it."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    divisor = getattr(preprocessor, 'pad_size_divisor', 1) or 1
    return tuple(-(-side // divisor) * divisor for side in shape)


def make_forward(
    model: nn.Module, shape: tuple[int, int], batch: int = 1
) -> Callable[[], Any]:
    """A function that runs the model as ``mode='tensor'`` does.

    Args:
        model (nn.Module): A detector or a classifier.
        shape (tuple[int]): Height and width of the images.
        batch (int): Number of images. Defaults to 1.

    Returns:
        Callable: Without arguments; it makes its own input.
    """
    padded = padded_shape(model, shape)
    detector = is_detector(model)

    def forward():
        images = torch.zeros(batch, 3, *padded)
        samples = None
        if detector:
            samples = [_detection_sample(shape, padded) for _ in range(batch)]
        return model(images, samples, mode='tensor')

    return forward


def is_detector(model: nn.Module) -> bool:
    """Whether a model takes what MMDetection's detectors take."""
    return any(
        kind.__module__.startswith('mmdet.') for kind in type(model).__mro__
    )


def _detection_sample(shape, padded):
    """A sample with one box, which some heads want in training."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    height, width = shape
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, width, height]]),
            labels=torch.zeros(1, dtype=torch.long),
        ),
        metainfo=dict(
            img_id=0,
            img_shape=shape,
            ori_shape=shape,
            pad_shape=padded,
            batch_input_shape=padded,
            scale_factor=(1.0, 1.0),
        ),
    )
