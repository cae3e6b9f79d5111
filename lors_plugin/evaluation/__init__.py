"""Metrics."""

from .coco_metric import CocoMetric
from .faster_coco import FasterCOCOeval

__all__ = ['CocoMetric', 'FasterCOCOeval']
