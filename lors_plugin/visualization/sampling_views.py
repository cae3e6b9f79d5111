"""From a detector and an image to the panels of ``sampling_figure``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps

from lors_plugin.inference import InferenceError, Prediction, TorchPredictor

from .sampling_figure import StageView
from .sampling_recorder import SamplingRecorder, StageRecord

# Queries that found the same object would hide each other.
SAME_OBJECT_IOU = 0.5


@dataclass
class Sampling:
    """Predictions of a detector for an image, with its sampling points.

    Attributes:
        prediction (Prediction): In pixels of the image.
        records (list[StageRecord]): Of each stage, in pixels of the
            network's input.
        factors (np.ndarray): Of width and height from the image to the
            network's input, shape (2, ).
    """

    prediction: Prediction
    records: list[StageRecord]
    factors: np.ndarray


def record_sampling(predictor: TorchPredictor, image: np.ndarray) -> Sampling:
    """Run an AdaMixer or LORS-AdaMixer on an image and record its stages.

    Args:
        predictor (TorchPredictor): The detector.
        image (np.ndarray): As ``predictor.read`` returns it.

    Raises:
        InferenceError: If the model is no AdaMixer.
    """
    try:
        recorder = SamplingRecorder(predictor.model)
    except TypeError as error:
        raise InferenceError(str(error)) from error
    with recorder:
        (sample,) = predictor.run([image])
    return Sampling(
        predictor.prediction(sample),
        recorder.records,
        np.array(sample.get('scale_factor', (1.0, 1.0))),
    )


def choose_queries(
    boxes: np.ndarray, scores: np.ndarray, top_k: int, score_thr: float
) -> list[int]:
    """Choose the queries with the best scores, one per object.

    Args:
        boxes (np.ndarray): Corners after the last stage, shape (N, 4).
        scores (np.ndarray): The best of each query, shape (N, ).
        top_k (int): How many to choose.
        score_thr (float): Smallest score.

    Returns:
        list[int]: Indices of queries, best first.
    """
    boxes = torch.as_tensor(boxes)
    ious = bbox_overlaps(boxes, boxes).numpy()
    chosen: list[int] = []
    for query in np.argsort(-scores, kind='stable').tolist():
        if len(chosen) == top_k or scores[query] < score_thr:
            break
        if not (ious[query, chosen] > SAME_OBJECT_IOU).any():
            chosen.append(query)
    if not chosen:
        raise InferenceError(
            f'no query has a score of {score_thr}, the best has '
            f'{scores.max():.3f}; choose a smaller threshold'
        )
    return chosen


def stage_views(
    records: Sequence,
    factors: np.ndarray,
    stages: Sequence[int],
    queries: Sequence[int],
    classes: Sequence[str],
) -> list[StageView]:
    """Bring the records of some stages into pixels of the original image.

    Args:
        records (Sequence[StageRecord]): All stages.
        factors (np.ndarray): See :class:`Sampling`.
        stages (Sequence[int]): Indices of the stages to show.
        queries (Sequence[int]): Indices of the queries to show.
        classes (Sequence[str]): Class names.

    Returns:
        list[StageView]: The stages.
    """
    queries = list(queries)
    labels = records[-1].scores[0, queries].argmax(-1).tolist()
    views = []
    for stage in stages:
        found = records[stage]
        scores = found.scores[0, queries, labels].tolist()
        corners = np.tile(factors, 2)
        views.append(
            StageView(
                stage=stage,
                boxes_in=found.boxes_in[0, queries].numpy() / corners,
                boxes_out=found.boxes_out[0, queries].numpy() / corners,
                texts=[
                    f'#{query} {classes[label]} {score:.2f}'
                    for query, label, score in zip(queries, labels, scores)
                ],
                points=found.points[0, queries].numpy() / factors,
                weights=found.weights[0, queries].numpy(),
            )
        )
    return views
