"""Do two models say the same? Outputs of both, and how far they differ."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lors_plugin.build import is_detector

_SAME_BOX = 0.99


@dataclass
class Difference:
    """The largest difference between two sets of tensors.

    Attributes:
        what (str): What was compared.
        absolute (float): The largest one.
        relative (float): The largest share of a tensor's largest value.
        decides (bool): Whether it has to be small. Detections need not:
            where two are nearly alike, either may be kept.
    """

    what: str
    absolute: float
    relative: float
    decides: bool = True

    def within(self, tolerance: float) -> bool:
        """Whether it is small enough; what is not a number never is."""
        return not self.decides or self.relative <= tolerance


@torch.no_grad()
def compare_outputs(
    before: nn.Module, after: nn.Module, images: Sequence[Tensor]
) -> list[Difference]:
    """Compare features, raw outputs of the heads, and predictions.

    Args:
        before (nn.Module): A detector or a classifier, in evaluation mode.
        after (nn.Module): Another one.
        images (Sequence[Tensor]): As loaded from files: (3, H, W), uint8.

    Returns:
        list[Difference]: Of each kind of output that the models have.
    """
    models = (before, after)
    batch = prepare(before, images)
    found = []
    if hasattr(before, 'extract_feat'):
        pair = [model.extract_feat(batch['inputs']) for model in models]
        found.append(difference('features', *pair))
    if hasattr(before, 'rpn_head') and hasattr(before, 'roi_head'):
        pair = _two_stage_outputs(before, after, batch)
    else:
        pair = [model(**batch, mode='tensor') for model in models]
    found.append(difference('raw outputs', *pair))
    # Transformers that take the best proposals for queries.
    found[-1].decides = not getattr(before, 'as_two_stage', False)
    # Predicting writes into the samples, so each gets its own.
    pair = [m(**prepare(m, images), mode='predict') for m in models]
    if is_detector(before):
        found.append(_detections(*pair))
    elif hasattr(pair[0][0], 'pred_score'):
        scores = [[s.pred_score for s in samples] for samples in pair]
        found.append(difference('predicted scores', *scores))
    return found


@torch.no_grad()
def own_rounding(model: nn.Module, images: Sequence[Tensor]) -> Difference:
    """How far the features of a model in float32 are from those in float64.

    Where this is large, no merging could keep them.

    Args:
        model (nn.Module): With ``extract_feat``, in evaluation mode.
        images (Sequence[Tensor]): (3, H, W), uint8.
    """
    inputs = prepare(model, images)['inputs']
    exact = deepcopy(model).double().extract_feat(inputs.double())
    return difference('rounding', model.extract_feat(inputs), exact)


def prepare(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Any]:
    """Normalise and pad images as the model's data preprocessor does.

    Args:
        model (nn.Module): A detector or a classifier.
        images (Sequence[Tensor]): (3, H, W), uint8.

    Returns:
        dict: ``inputs`` (B, 3, H, W) and ``data_samples``.
    """
    samples = None
    if is_detector(model):
        samples = [_sample(index, image) for index, image in enumerate(images)]
    batch = model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples), False
    )
    return dict(inputs=batch['inputs'], data_samples=batch['data_samples'])


def difference(what: str, before: Any, after: Any) -> Difference:
    """The largest difference between nested lists of tensors.

    Args:
        what (str): Their name.
        before (Any): Tensors in lists, tuples and dicts.
        after (Any): As ``before``; anything else differs infinitely.

    Returns:
        Difference: Absolute, and as a share of the largest value.
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
        # Masks hold infinity on both sides.
        gap = (old - new).abs().where(old != new, torch.zeros_like(old)).max()
        size = old.abs().where(old.isfinite(), torch.zeros_like(old)).max()
        share = gap / size.clamp(min=1e-12)
        if share.isnan():
            return Difference(what, torch.nan, torch.nan)
        absolute = max(absolute, gap.item())
        relative = max(relative, share.item())
    return Difference(what, absolute, relative)


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
    """Raw outputs of both stages; the second sees the same proposals."""
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


def _detections(before: list, after: list) -> Difference:
    """Scores in order, and how many boxes are found again."""
    from torchvision.ops import box_iou

    number, alike, pairs = 0, 0, ([], [])
    for samples in zip(before, after):
        old, new = (sample.pred_instances for sample in samples)
        number += len(old)
        kept = min(len(old), len(new))
        for scores, found in zip(pairs, (old, new)):
            scores.append(found.scores.sort(descending=True).values[:kept])
        if kept:
            same = box_iou(_corners(old), _corners(new)) > _SAME_BOX
            same &= old.labels[:, None] == new.labels
            alike += int(same.any(1).sum())
    result = difference('scores of detections', *pairs)
    result.what += f', {alike} of {number} boxes found again'
    result.decides = False
    return result


def _corners(instances: Any) -> Tensor:
    boxes: Optional[Any] = instances.bboxes
    return getattr(boxes, 'tensor', boxes)
