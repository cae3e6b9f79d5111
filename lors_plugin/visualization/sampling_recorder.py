"""Record where the queries of a detector sample, stage by stage."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lors_plugin.adamixer.box_geometry import decode_boxes
from lors_plugin.ops.sampling_3d.reference import level_weights


@dataclass
class StageRecord:
    """The sampling of one stage, in pixels of the network's input.

    Attributes:
        boxes_in (Tensor): Corners that the stage started from, shape
            (B, N, 4).
        boxes_out (Tensor): Corners that it made, shape (B, N, 4).
        scores (Tensor): After the sigmoid, shape (B, N, classes).
        points (Tensor): x and y, shape (B, N, G, P, 2).
        weights (Tensor): Share of each of the L levels in each point,
            shape (B, N, G, P, L).
        strides (tuple[int]): Pixels a cell of each level.
    """

    boxes_in: Tensor
    boxes_out: Tensor
    scores: Tensor
    points: Tensor
    weights: Tensor
    strides: tuple[int, ...]


class SamplingRecorder:
    """Record boxes and sampling points of a detector's forward passes.

    Hooks look on and change nothing. The records are those of the last
    forward pass, one a stage, on the CPU.

    Example:
        >>> with SamplingRecorder(model) as recorder:
        ...     inference_detector(model, 'image.jpg')
        >>> recorder.records[-1].points.shape

    Args:
        model (nn.Module): An AdaMixer or LORS-AdaMixer, or its decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        decoder = getattr(model, 'decoder', model)
        self.stages = getattr(decoder, 'stages', ())
        if not len(self.stages) or any(
            not hasattr(getattr(stage, 'sampling', None), 'points')
            for stage in self.stages
        ):
            raise TypeError(
                f'{type(model).__name__} has no decoder whose stages sample '
                'points; this is for AdaMixer and LORS-AdaMixer'
            )
        self.records: list[StageRecord] = []
        self._seen: dict = {}
        self._handles: list = []

    def __enter__(self) -> 'SamplingRecorder':
        for index, stage in enumerate(self.stages):
            self._handles += [
                stage.sampling.register_forward_pre_hook(
                    self._look_at_sampling, with_kwargs=True
                ),
                stage.register_forward_hook(self._at_the_end_of(index)),
            ]
        return self

    def __exit__(self, *error) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _look_at_sampling(
        self, module: nn.Module, args: Sequence, kwargs: dict
    ) -> None:
        """Compute the points as the module is about to."""
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        given = given.arguments
        strides = tuple(given['strides'])
        points = module.points(given['content'], given['xyzr']).float()
        weights = level_weights(points[..., 2], strides).movedim(0, -1)
        self._seen = dict(
            boxes_in=decode_boxes(given['xyzr']).float().cpu(),
            points=points[..., :2].cpu(),
            weights=weights.cpu(),
            strides=strides,
        )

    def _at_the_end_of(self, index: int):
        """Make the hook that closes the record of a stage."""

        @torch.no_grad()
        def close(module: nn.Module, args: Sequence, output: Sequence) -> None:
            scores, xyzr, _ = output
            record = StageRecord(
                boxes_out=decode_boxes(xyzr).float().cpu(),
                scores=scores.float().sigmoid().cpu(),
                **self._seen,
            )
            self.records[index:] = [record]

        return close
