"""COCO's evaluation with the counting done by ``faster-coco-eval``."""

import importlib.util
import logging

from mmengine.logging import print_log
from pycocotools.cocoeval import COCOeval

_PARAMS = (
    'imgIds',
    'catIds',
    'iouThrs',
    'recThrs',
    'maxDets',
    'areaRng',
    'areaRngLbl',
    'useCats',
)


def is_installed() -> bool:
    """Return whether ``faster-coco-eval`` can be imported."""
    return importlib.util.find_spec('faster_coco_eval') is not None


class FasterCOCOeval(COCOeval):
    """``pycocotools.cocoeval.COCOeval`` several times as fast.

    Matching and accumulation run in the compiled code of
    ``faster-coco-eval``; the parameters before and the summary afterwards
    are pycocotools' own. Only :attr:`evalImgs` stays empty.

    Ids must be whole numbers from 0 on that a double holds: with others the
    compiled code matches nothing. :class:`CocoMetric` takes any.
    """

    def evaluate(self) -> None:
        """Match detections and ground truth, and accumulate.

        Raises:
            ValueError: If an id is not a whole number from 0 to 2**53.
        """
        from faster_coco_eval import COCOeval_faster

        truth = self.cocoGt
        for number in (*truth.imgs, *truth.cats, *truth.anns):
            if not isinstance(number, int) or not 0 <= number < 2**53:
                raise ValueError(
                    f'faster-coco-eval cannot take the id {number!r}: not a '
                    'whole number from 0 to 2**53. lors_plugin.CocoMetric '
                    'numbers images, categories and annotations anew'
                )
        inner = COCOeval_faster(
            self.cocoGt,
            self.cocoDt,
            self.params.iouType,
            print_function=_log,
        )
        for name in _PARAMS:
            setattr(inner.params, name, getattr(self.params, name))
        inner.evaluate()
        inner.accumulate()
        # It has sorted some of them, as pycocotools does.
        for name in _PARAMS:
            setattr(self.params, name, getattr(inner.params, name))
        self._paramsEval = inner.params
        self._accumulated = inner.eval

    def accumulate(self, p=None) -> None:
        """Take what :meth:`evaluate` found; other parameters are refused."""
        if p is not None and p is not self.params:
            raise ValueError(
                'accumulate() takes the parameters of evaluate(); for '
                "others use backend='pycocotools'"
            )
        keys = ('precision', 'recall', 'scores')
        self.eval = dict(
            {key: self._accumulated[key] for key in keys},
            params=self.params,
            counts=list(self._accumulated['precision'].shape),
        )


def _log(message: str) -> None:
    print_log(message, logger='current', level=logging.DEBUG)
