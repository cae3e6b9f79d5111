"""From a config to a model that can be counted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from lors_plugin.build import (
    build_model,
    image_channels,
    is_detector,
    padded_shape,
    test_shape,
)

from .model_counts import ModelCounts, count_model
from .weightless import EmptyWeights, WeightlessModel


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
            model = build_model(cfg)
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


def build_weightless(cfg: dict) -> WeightlessModel:
    """Build the model of a config without memory for its weights."""
    try:
        with EmptyWeights():
            return WeightlessModel(build_model(cfg))
    except (RuntimeError, NotImplementedError):
        # It looks at values of its weights while it is built.
        return WeightlessModel(build_model(cfg))


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
    channels, detector = image_channels(model), is_detector(model)

    def forward():
        images = torch.zeros(batch, channels, *padded)
        samples = None
        if detector:
            samples = [_detection_sample(shape, padded) for _ in range(batch)]
        return model(images, samples, mode='tensor')

    return forward


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
