"""MMDetection's COCO metric with a choice of who counts."""

import logging
from collections import Counter
from functools import partial
from types import FunctionType
from typing import Any, Optional

from mmdet.datasets.api_wrappers import COCOeval, COCOevalMP
from mmdet.evaluation.metrics import CocoMetric as HostCocoMetric
from mmengine.logging import print_log

from lors_plugin.registry import METRICS
from lors_plugin.utils import few

from .faster_coco import FasterCOCOeval, is_installed
from .numbering import Annotations, OfAll, by_position, labels_of

BACKENDS = ('auto', 'faster', 'pycocotools')


@METRICS.register_module()
class CocoMetric(HostCocoMetric):
    """MMDetection's ``CocoMetric``, counted by ``faster-coco-eval``.

    Labels are those of the class names of the data set, whatever the order
    of the categories in the annotation file, and any ids will do; the
    numbers are MMDetection's where that allows both.

    Args:
        backend (str): 'faster' for ``faster-coco-eval``, 'pycocotools', or
            'auto': the first where it is installed. The numbers are the
            same. Defaults to 'auto'.
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
        host = _with_globals(HostCocoMetric.__init__, COCO=Annotations)
        host(self, *args, **kwargs)
        if backend == 'faster' and getattr(self, 'use_mp_eval', False):
            raise ValueError(
                "evaluator.backend='faster' and use_mp_eval=True exclude "
                'each other: the latter is several processes of pycocotools'
            )
        self.backend = backend
        self._has_file = self._coco_api is not None

    @property
    def dataset_meta(self) -> Optional[dict]:
        """dict, optional: Meta information of the data set."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: Optional[dict]) -> None:
        # Loops set it when they are built, before the first step.
        self._dataset_meta = dataset_meta
        if self._has_file and isinstance(dataset_meta, dict):
            classes = dataset_meta.get('classes')
            if classes is not None:
                self.cat_ids = self._category_ids(list(classes))

    def _category_ids(self, classes: list[str]) -> list:
        """Return the id of the category of each class."""
        ids = {}
        for category in self._coco_api.dataset['categories']:
            ids.setdefault(category['name'], category['id'])
        absent = [name for name in classes if name not in ids]
        if absent:
            raise ValueError(
                f'evaluator.ann_file lacks {len(absent)} of {len(classes)} '
                f'classes of the data set: {few(absent, 5)}. It has '
                f'{few(list(ids), 5)}'
            )
        twice = [n for n, count in Counter(classes).items() if count > 1]
        if twice:
            raise ValueError(
                f'the data set has a class name twice: {few(twice, 5)}'
            )
        if [name for name in ids if name in classes] != classes:
            print_log(
                'the classes of the data set are in another order than the '
                'categories of evaluator.ann_file. The labels count in the '
                "order of the classes; MMDetection's CocoDataset labels in "
                'the order of its file',
                logger='current',
                level=logging.WARNING,
            )
        return [ids[name] for name in classes]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """See :class:`mmdet.evaluation.CocoMetric`."""
        if not self._has_file:
            ids = [truth['img_id'] for truth, _ in results]
            if len(set(ids)) < len(ids):  # of several data sets
                results = [
                    (dict(truth, img_id=n), dict(found, img_id=n))
                    for n, (truth, found) in enumerate(results)
                ]
        host = _with_globals(
            HostCocoMetric.compute_metrics,
            COCOeval=self._count,
            COCOevalMP=partial(self._make, _InProcesses),
        )
        return host(self, results)

    def _count(self, ground_truth, detections, iou_type) -> COCOeval:
        """Take the place of ``COCOeval`` in the host's method."""
        faster = self.backend == 'faster' or (
            self.backend == 'auto' and is_installed()
        )
        kind = _Faster if faster else _PyCOCOTools
        return self._make(kind, ground_truth, detections, iou_type)

    def _make(self, kind, ground_truth, detections, iou_type) -> COCOeval:
        """Make an evaluator on data with ids by position."""
        by = 'faster-coco-eval' if kind is _Faster else 'pycocotools'
        print_log(
            f'COCO evaluation by {by}', logger='current', level=logging.INFO
        )
        labels = labels_of(ground_truth, self.cat_ids)
        return kind(
            by_position(ground_truth, self.img_ids, labels),
            by_position(detections, self.img_ids, labels),
            iou_type,
        )


class _Faster(OfAll, FasterCOCOeval):
    """By ``faster-coco-eval``."""


class _PyCOCOTools(OfAll, COCOeval):
    """By pycocotools."""


class _InProcesses(OfAll, COCOevalMP):
    """By several processes of pycocotools, for ``use_mp_eval``."""


def _with_globals(method: FunctionType, **others: Any) -> FunctionType:
    """The host's method with other classes among its globals.

    The method makes them by a global name and offers no other way.
    A function of the same code with globals of its own leaves the host's
    module as it is.
    """
    return FunctionType(
        method.__code__,
        {**method.__globals__, **others},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
