"""Predictions of detectors and classifiers for one image."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np


@dataclass
class Prediction:
    """Predictions for one image, best score first.

    Attributes:
        labels (np.ndarray): Indices of classes, shape (N, ).
        scores (np.ndarray): From 0 to 1, shape (N, ).
        boxes (np.ndarray, optional): Corners x1, y1, x2, y2 in pixels of
            the image, shape (N, 4); None for classifiers, which predict one
            score per class.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def sorted(cls, labels, scores, boxes=None) -> 'Prediction':
        """Make a prediction from arrays in any order."""
        scores = np.asarray(scores, np.float64)
        order = np.argsort(-scores, kind='stable')
        if boxes is not None:
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
        return cls(np.asarray(labels, int)[order], scores[order], boxes)

    def inside(self, height: int, width: int) -> 'Prediction':
        """Clip boxes to the image, and drop those outside of it.

        Args:
            height (int): Of the image.
            width (int): Of the image.

        Returns:
            Prediction: A new one.
        """
        if self.boxes is None:
            return self
        boxes = np.clip(self.boxes, 0, [width, height] * 2)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Prediction(self.labels[keep], self.scores[keep], boxes[keep])

    def select(
        self,
        score_thr: float = 0.0,
        labels: Optional[Collection[int]] = None,
        number: Optional[int] = None,
    ) -> 'Prediction':
        """Keep what has a high score.

        Args:
            score_thr (float): Smallest score. Defaults to 0.
            labels (Collection[int], optional): Classes to keep. Defaults to
                None, which means all.
            number (int, optional): Keep so many at most.

        Returns:
            Prediction: A new one.
        """
        keep = self.scores >= score_thr
        if labels is not None:
            keep &= np.isin(self.labels, list(labels))
        index = np.flatnonzero(keep)[:number]
        boxes = None if self.boxes is None else self.boxes[index]
        return Prediction(self.labels[index], self.scores[index], boxes)


def name_of(classes: Sequence[str], label: int) -> str:
    """Return the name of a class, its number where there is none."""
    return classes[label] if label < len(classes) else str(label)
