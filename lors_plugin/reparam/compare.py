"""Compare two models: outputs, and what they cost."""

import statistics
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lors_plugin.analysis import count_model, make_forward
from lors_plugin.build import is_detector

# Largest error of a detection that counts as found again.
FOUND_AGAIN = 1e-2
_FLOOR = 1e-6  # of coordinates and scores


@dataclass
class Difference:
    """The largest difference between two sets of tensors.

    Attributes:
        what (str): Name of the compared outputs.
        absolute (float, optional): The largest one, where they have a unit.
        relative (float): The largest share of a tensor's largest value.
        decides (bool): Whether it has to be small. Detections need not:
            where two are nearly alike, either may be kept.
    """

    what: str
    absolute: Optional[float]
    relative: float
    decides: bool = True

    def __str__(self) -> str:
        """Return a line about it."""
        value = '' if self.absolute is None else f'{self.absolute:.3g}, '
        share = f'{self.relative:.2g} of the largest value'
        return f'largest difference of {self.what}: {value}{share}'

    def within(self, tolerance: float) -> bool:
        """Return whether it is small enough; NaN never is."""
        return not self.decides or self.relative <= tolerance


@torch.no_grad()
def compare_outputs(
    before: nn.Module, after: nn.Module, images: Sequence[Tensor]
) -> list[Difference]:
    """Compare features, raw outputs of the heads, and predictions.

    Args:
        before (nn.Module): A detector or a classifier, in evaluation mode.
        after (nn.Module): Another one.
        images (Sequence[Tensor]): As loaded from files: (channels, H, W),
            uint8.

    Returns:
        list[Difference]: One per kind of output that the models have.
    """
    models = (before, after)
    batch = prepare(before, images)
    found = []
    if hasattr(before, 'extract_feat'):
        pair = [features(model, batch['inputs']) for model in models]
        found.append(difference('features', *pair))
    if hasattr(before, 'rpn_head') and hasattr(before, 'roi_head'):
        pair = _two_stage_outputs(before, after, batch)
    elif not hasattr(before, 'language_model'):  # those predict only
        pair = [model(**batch, mode='tensor') for model in models]
    else:
        pair = None
    if pair is not None:
        found.append(difference('raw outputs', *pair))
        # Transformers that take the best proposals for queries.
        found[-1].decides = not getattr(before, 'as_two_stage', False)
    # Predicting writes into the samples, so each model gets its own.
    pair = [m(**prepare(m, images), mode='predict') for m in models]
    if is_detector(before):
        found.append(_detections_again(*pair))
    elif hasattr(pair[0][0], 'pred_score'):
        scores = [[s.pred_score for s in samples] for samples in pair]
        found.append(difference('predicted scores', *scores))
    return found


@torch.no_grad()
def own_rounding(model: nn.Module, images: Sequence[Tensor]) -> Difference:
    """Compare a model's features in float32 with those in float64.

    Where they differ much, no merging can keep them.

    Args:
        model (nn.Module): With ``extract_feat``, in evaluation mode.
        images (Sequence[Tensor]): (channels, H, W), uint8.
    """
    inputs = prepare(model, images)['inputs']
    exact = features(deepcopy(model).double(), inputs.double())
    return difference('rounding', features(model, inputs), exact)


def features(model: nn.Module, inputs: Tensor) -> Any:
    """Compute a model's features, or what it returns instead of any.

    Args:
        model (nn.Module): With ``extract_feat``, in evaluation mode.
        inputs (Tensor): Shape (B, channels, H, W).
    """
    try:
        return model.extract_feat(inputs)
    except NotImplementedError:  # MMPretrain's wrapper of Hugging Face
        return model(inputs)


def prepare(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Any]:
    """Normalise and pad images as the model's data preprocessor does.

    Args:
        model (nn.Module): A detector or a classifier.
        images (Sequence[Tensor]): (channels, H, W), uint8.

    Returns:
        dict: ``inputs`` (B, channels, H, W) and ``data_samples``.
    """
    samples = None
    if is_detector(model):
        samples = [_sample(index, image) for index, image in enumerate(images)]
        if hasattr(model, 'language_model'):
            for sample in samples:
                sample.set_metainfo(dict(text=('cell',), custom_entities=True))
    batch = model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples), False
    )
    return dict(inputs=batch['inputs'], data_samples=batch['data_samples'])


def difference(what: str, before: Any, after: Any) -> Difference:
    """Measure the largest difference between nested lists of tensors.

    Args:
        what (str): Their name.
        before (Any): Tensors in lists, tuples and dicts.
        after (Any): As ``before``; another structure or shape differs
            infinitely.

    Returns:
        Difference: Absolute, and as a share of each tensor's largest value.
    """
    absolute, relative = 0.0, 0.0
    pairs = [list(_tensors(before)), list(_tensors(after))]
    if not pairs[0] or [t.shape for t in pairs[0]] != [
        t.shape for t in pairs[1]
    ]:
        return Difference(what, torch.inf, torch.inf)
    for old, new in zip(*pairs):
        if not old.numel():
            continue
        old, new = old.double(), new.double()
        # Masks hold infinity in both.
        gap = (old - new).abs().where(old != new, torch.zeros_like(old)).max()
        size = old.abs().where(old.isfinite(), torch.zeros_like(old)).max()
        share = gap / size.clamp(min=1e-30)
        if share.isnan():
            return Difference(what, torch.nan, torch.nan)
        absolute = max(absolute, gap.item())
        relative = max(relative, share.item())
    return Difference(what, absolute, relative)


def detection_errors(
    before: dict[str, Tensor], after: dict[str, Tensor]
) -> Tensor:
    """Measure the error between each two detections of an image.

    The error of two boxes is relative to the largest coordinate, that of two
    scores to the best score; the larger one counts. Detections of different
    labels differ infinitely.

    Args:
        before (dict[str, Tensor]): ``boxes`` (n, 4), ``scores`` (n, ) and
            ``labels`` (n, ).
        after (dict[str, Tensor]): The same of m detections.

    Returns:
        Tensor: Shape (n, m), float64.
    """
    boxes, others = before['boxes'].double(), after['boxes'].double()
    scores, theirs = before['scores'].double(), after['scores'].double()
    if not len(boxes) or not len(others):
        return boxes.new_zeros(len(boxes), len(others))
    gaps = (boxes[:, None] - others).abs().amax(-1)
    errors = torch.maximum(
        gaps / (boxes.abs().max() + _FLOOR),
        (scores[:, None] - theirs).abs() / (scores.max() + _FLOOR),
    )
    return errors.masked_fill(
        before['labels'][:, None] != after['labels'], torch.inf
    )


def detections_difference(
    before: Sequence[dict[str, Tensor]], after: Sequence[dict[str, Tensor]]
) -> Difference:
    """Compare the best detections of images, in any order.

    Each detection is matched with the nearest one, in both directions. Which
    of two with nearly the same score comes last is arbitrary, so the last
    one may be another if its score is the same.

    Args:
        before (Sequence[dict]): Per image as for :func:`detection_errors`.
        after (Sequence[dict]): The same number of detections per image.

    Returns:
        Difference: The largest error, relative.
    """
    worst = 0.0
    for old, new in zip(before, after):
        if len(old['scores']) != len(new['scores']):
            return Difference('detections', None, torch.inf)
        if not len(old['scores']):
            continue
        values = (new['boxes'], new['scores'])
        if not all(value.isfinite().all() for value in values):
            return Difference('detections', None, torch.nan)
        errors = detection_errors(old, new)
        lowest = torch.minimum(old['scores'].min(), new['scores'].min())
        best = old['scores'].max() + _FLOOR
        for nearest, side in ((errors.amin(1), old), (errors.amin(0), new)):
            last = side['scores'].argmin()
            excess = (side['scores'][last] - lowest) / best
            nearest[last] = torch.minimum(nearest[last], excess.double())
            worst = max(worst, nearest.max().item())
    return Difference('detections', None, worst)


@dataclass
class Cost:
    """Cost of one model.

    Attributes:
        parameters (int): Of the whole model.
        multiply_adds (int): For one image.
        seconds (dict[int, float]): Median time of a forward pass by the
            number of images.
    """

    parameters: int
    multiply_adds: int
    seconds: dict


@torch.no_grad()
def compare_costs(
    models: Sequence[nn.Module],
    shape: tuple[int, int],
    batches: Sequence[int] = (1,),
    repeats: int = 10,
) -> list[Cost]:
    """Count models, and time them in turns on this machine.

    Other load on the machine then slows all alike; only ratios of the times
    mean something.

    Args:
        models (Sequence[nn.Module]): Detectors or classifiers, in evaluation
            mode.
        shape (tuple[int]): Height and width of the images.
        batches (Sequence[int]): Numbers of images to time.
        repeats (int): Passes of each model. Defaults to 10.

    Returns:
        list[Cost]: In the order of the models.
    """
    costs = []
    for model in models:
        forward = make_forward(model, shape)
        total = count_model(model, forward, with_memory=False).total
        costs.append(Cost(total.parameters, total.multiply_adds, {}))
    for batch in batches:
        functions = [make_forward(model, shape, batch) for model in models]
        times = [[] for _ in functions]
        for repeat in range(repeats + 1):
            for turn in range(len(functions)):
                # Another one begins each time.
                index = (turn + repeat) % len(functions)
                start = time.perf_counter()
                functions[index]()
                if repeat:  # the first warms up
                    times[index].append(time.perf_counter() - start)
        for cost, seconds in zip(costs, times):
            cost.seconds[batch] = statistics.median(seconds)
    return costs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _sample(index: int, image: Tensor) -> Any:
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[1:])
    return DetDataSample(
        metainfo=dict(
            img_id=index,
            img_shape=shape,
            ori_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )


def _two_stage_outputs(
    before: nn.Module, after: nn.Module, batch: dict
) -> list[tuple]:
    """Run both stages; the second one of both models on equal proposals."""
    outputs, proposals = [], None
    for model in (before, after):
        feats = model.extract_feat(batch['inputs'])
        if proposals is None:
            proposals = model.rpn_head.predict(
                feats, batch['data_samples'], rescale=False
            )
        second = model.roi_head.forward(
            feats, proposals, batch['data_samples']
        )
        outputs.append((model.rpn_head(feats), second))
    return outputs


def _detections_again(before: list, after: list) -> Difference:
    """Count the detections that are found again, and how far they moved."""
    number, again, worst = 0, 0, 0.0
    for samples in zip(before, after):
        old, new = (_detections(sample.pred_instances) for sample in samples)
        errors = detection_errors(old, new)
        number += len(errors)
        if errors.numel():
            nearest = errors.amin(1)
            nearest = nearest[nearest <= FOUND_AGAIN]
            again += len(nearest)
            worst = max([worst, *nearest.tolist()])
    text = f'detections, {again} of {number} boxes found again'
    return Difference(text, None, worst, decides=False)


def _detections(instances: Any) -> dict[str, Tensor]:
    boxes = instances.bboxes
    return dict(
        boxes=getattr(boxes, 'tensor', boxes),
        scores=instances.scores,
        labels=instances.labels,
    )
