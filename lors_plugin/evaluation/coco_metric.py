"""MMDetection's COCO metric with a choice of who counts."""

import logging
from types import FunctionType
from typing import Any

from mmdet.evaluation.metrics import CocoMetric as HostCocoMetric
from mmengine.logging import print_log

from lors_plugin.registry import METRICS

from .faster_coco import FasterCOCOeval, is_installed, why_not

BACKENDS = ('auto', 'faster', 'pycocotools')


@METRICS.register_module()
class CocoMetric(HostCocoMetric):
    """MMDetection's ``CocoMetric``, counted by ``faster-coco-eval``.

    Args:
        backend (str): 'faster' for ``faster-coco-eval``, 'pycocotools', or
            'auto': the first where it is installed and the annotations
            allow it. The numbers are the same. Defaults to 'auto'.
        **kwargs: See :class:`mmdet.evaluation.CocoMetric`.
    """

    def __init__(self, *args: Any, backend: str = 'auto', **kwargs) -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f'evaluator.backend={backend!r} must be one of {BACKENDS}'
            )
        if backend == 'faster' and not is_installed():
            raise ImportError(
                "evaluator.backend='faster' needs faster-coco-eval; "
                'pip install faster-coco-eval'
            )
        super().__init__(*args, **kwargs)
        if backend == 'faster' and getattr(self, 'use_mp_eval', False):
            raise ValueError(
                "evaluator.backend='faster' and use_mp_eval=True exclude "
                'each other: the latter is several processes of pycocotools'
            )
        self.backend = backend

    def compute_metrics(self, results: list) -> dict[str, float]:
        """See :class:`mmdet.evaluation.CocoMetric`."""
        return _with_evaluator(HostCocoMetric.compute_metrics, self._make)(
            self, results
        )

    def _make(self, ground_truth, detections, iou_type):
        """Take the place of ``COCOeval`` in the host's method."""
        faster, reason = self.backend == 'faster', ''
        if self.backend != 'pycocotools':
            reason = why_not(ground_truth)
            if faster and reason:
                raise TypeError(
                    f"evaluator.backend='faster' is not possible: {reason}; "
                    "'auto' takes pycocotools then"
                )
            faster = not reason and is_installed()
        kind = FasterCOCOeval if faster else _HOST_EVALUATOR
        name = 'faster-coco-eval' if faster else 'pycocotools'
        print_log(
            f'COCO evaluation by {name}' + (reason and f': {reason}'),
            logger='current',
            level=logging.INFO,
        )
        return kind(ground_truth, detections, iou_type)


def _with_evaluator(method, evaluator) -> FunctionType:
    """The host's method with another ``COCOeval`` among its globals.

    The method makes its evaluator by a global name and offers no other way.
    A function of the same code with globals of its own leaves the host's
    module as it is.
    """
    return FunctionType(
        method.__code__,
        {**method.__globals__, 'COCOeval': evaluator},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )


_HOST_EVALUATOR = HostCocoMetric.compute_metrics.__globals__['COCOeval']
