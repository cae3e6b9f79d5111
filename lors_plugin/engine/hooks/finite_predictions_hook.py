"""Predictions that are no numbers are told, with the image."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor

from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class FinitePredictionsHook(Hook):
    """Warn of NaN and inf in predictions during validation and tests.

    Metrics do not: a score that is NaN ranks somewhere, and the AP is low.
    The first image is named at once, how many there were at the end.
    """

    def __init__(self) -> None:
        self._bad = self._total = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Count anew."""
        self._bad = self._total = 0

    before_test_epoch = before_val_epoch

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[Sequence] = None,
    ) -> None:
        """Look at the predictions of a batch."""
        for sample in outputs or ():
            if not isinstance(sample, BaseDataElement):
                continue
            self._total += 1
            names = not_finite(sample)
            if names and not self._bad:
                image = sample.metainfo.get('img_path', 'an image')
                runner.logger.warning(
                    f'{image}: {", ".join(names)} of the prediction hold '
                    'NaN or inf. The weights are damaged, the training '
                    'diverged, or values overflow (float16: try bfloat16)'
                )
            self._bad += bool(names)

    after_test_iter = after_val_iter

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[dict] = None
    ) -> None:
        """Sum up."""
        if self._bad:
            runner.logger.warning(
                f'{self._bad} of {self._total} images have predictions with '
                'NaN or inf (of this process): the metrics mean nothing'
            )

    after_test_epoch = after_val_epoch


def not_finite(sample: BaseDataElement) -> list[str]:
    """Return the names of the predictions that hold NaN or inf.

    Args:
        sample (BaseDataElement): The predictions of an image.

    Returns:
        list[str]: Such as ``pred_instances.scores``.
    """
    return [
        name
        for name, value in _predictions(sample)
        if value.is_floating_point() and not value.isfinite().all()
    ]


def _predictions(
    element: BaseDataElement, prefix: str = ''
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of predictions by their names."""
    for name, value in element.items():
        if not prefix and not name.startswith('pred'):
            continue
        if isinstance(value, BaseDataElement):
            yield from _predictions(value, f'{prefix}{name}.')
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value
