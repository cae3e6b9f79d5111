"""Detectors of MMDetection as functions from one image to detections.

What :mod:`lors_plugin.export.models` does for AdaMixer, for DETR and its
descendants and for dense heads. Their own code writes the size of maps into
the program and differs between images, so a file holds one image of one size.
Image and padding are told apart by ``sizes``, which masks and clips boxes as
the host does.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torchvision
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import DetectionTransformer, SingleStageDetector
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from torch import Tensor, nn

from .check import ExportError
from .models import DetectorBase, best_of


def stock_detector(model: nn.Module, kind: str = 'float') -> DetectorBase:
    """Make a module to export of a detector of MMDetection.

    Args:
        model (nn.Module): From :func:`lors_plugin.export.for_export`.
        kind (str): 'float', 'uint8' or 'normalized'. Defaults to 'float'.

    Raises:
        ExportError: If its head predicts in a way that is not known here.
    """
    if isinstance(model, DetectionTransformer):
        return TransformerForExport(model, kind)
    head = getattr(model, 'bbox_head', None)
    if isinstance(model, SingleStageDetector) and all(
        getattr(type(head), name, None) is getattr(BaseDenseHead, name)
        for name in ('predict_by_feat', '_predict_by_feat_single')
    ):
        return DenseForExport(model, kind)
    raise ExportError(
        f'{type(model).__name__} with {type(head).__name__} predicts in a '
        'way that this tool does not know: it exports AdaMixer, DETR and its '
        "descendants, and dense heads with MMDetection's usual prediction, "
        'as RetinaNet, FCOS and ATSS. Merge its adapters by tools/reparam.py; '
        'the plain checkpoint and config are for MMDeploy'
    )


class TransformerForExport(DetectorBase):
    """DETR, Conditional, DAB and Deformable DETR, DINO.

    Args:
        model (DetectionTransformer): From :func:`for_export`.
        kind (str): See :class:`~lors_plugin.export.models.Normalize`.
    """

    def detect(
        self, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DetectorBase.forward`, for one image."""
        height, width = map(int, images.shape[2:])
        y = torch.arange(height, device=images.device).unsqueeze(-1)
        x = torch.arange(width, device=images.device)
        outside = (x >= sizes[0, 0]) | (y >= sizes[0, 1])
        # Smaller than the batch: where it is not, hosts make no mask.
        meta = dict(
            img_shape=(height - 1, width), batch_input_shape=(height, width)
        )
        feats = self.model.extract_feat(images)
        with _with_mask(outside.to(images).unsqueeze(0)):
            states = self.model.forward_transformer(
                feats, [DetDataSample(metainfo=meta)]
            )
        head = self.model.bbox_head
        logits, boxes = (layers[-1] for layers in head(**states)[:2])
        centre, size = boxes.split(2, -1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
        scale = torch.cat([sizes, sizes], -1).unsqueeze(1)
        boxes = (boxes * scale).clamp(min=0).minimum(scale)
        number = head.test_cfg.get('max_per_img', logits.shape[1])
        if head.loss_cls.use_sigmoid:
            return best_of(logits.sigmoid(), boxes, number)
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, index = scores.topk(number)
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores, labels.gather(1, index)


class DenseForExport(DetectorBase):
    """RetinaNet, FCOS, ATSS and others that share their prediction.

    Args:
        model (SingleStageDetector): From :func:`for_export`.
        kind (str): See :class:`~lors_plugin.export.models.Normalize`.

    Raises:
        ExportError: If boxes are filtered by another NMS than the plain one.
    """

    open_sizes = dict.fromkeys(DetectorBase.outputs, {1: 'detections'})

    def __init__(self, model: nn.Module, kind: str = 'float') -> None:
        super().__init__(model, kind)
        self.cfg = ConfigDict(model.bbox_head.test_cfg)
        nms = dict(self.cfg.nms)
        if nms.pop('type', 'nms') != 'nms' or set(nms) != {'iou_threshold'}:
            raise ExportError(
                f'test_cfg.nms={dict(self.cfg.nms)}: only type="nms" with an '
                'iou_threshold is exported'
            )

    def detect(
        self, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DetectorBase.forward`, for one image."""
        head = self.model.bbox_head
        levels = list(zip(*head(self.model.extract_feat(images))))
        shapes = [tuple(map(int, level[0].shape[2:])) for level in levels]
        priors = head.prior_generator.grid_priors(
            shapes, dtype=images.dtype, device=images.device
        )
        found = [
            self._candidates(*map(_rows, level), priors=centres)
            for level, centres in zip(levels, priors)
        ]
        scores, factors, labels, deltas, priors = map(torch.cat, zip(*found))
        boxes = head.bbox_coder.decode(priors, deltas, max_shape=None)
        if head.bbox_coder.clip_border:
            limits = torch.cat([sizes, sizes], -1)
            boxes = boxes.clamp(min=0).minimum(limits)
        valid = scores > self.cfg.get('score_thr', 0)
        smallest = self.cfg.get('min_bbox_size', -1)
        if smallest >= 0:
            extent = boxes[:, 2:] - boxes[:, :2]
            valid = valid & (extent > smallest).all(-1)
        index = valid.nonzero().squeeze(-1)
        boxes, labels = boxes[index], labels[index]
        scores = (scores * factors)[index]
        # Boxes of two classes never overlap when they are this far apart.
        apart = labels.to(boxes) * (sum(map(int, images.shape[2:])) + 1)
        keep = torchvision.ops.nms(
            boxes + apart.unsqueeze(-1), scores, self.cfg.nms.iou_threshold
        )[: self.cfg.max_per_img]
        return (
            boxes[keep].unsqueeze(0),
            scores[keep].unsqueeze(0),
            labels[keep].unsqueeze(0),
        )

    def _candidates(
        self, logits: Tensor, deltas: Tensor, *factor: Tensor, priors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the best pairs of a prior and a class of one level."""
        head = self.model.bbox_head
        logits = logits.reshape(-1, head.cls_out_channels)
        if head.use_sigmoid_cls:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)[:, :-1]
        classes, number = int(scores.shape[-1]), int(scores.numel())
        wanted = self.cfg.get('nms_pre', -1)
        scores, index = scores.flatten().topk(
            min(wanted, number) if wanted > 0 else number
        )
        row = torch.div(index, classes, rounding_mode='floor')
        factor = (
            factor[0].flatten().sigmoid()[row]
            if factor
            else (torch.ones_like(scores))
        )
        deltas = deltas.reshape(-1, head.bbox_coder.encode_size)[row]
        return scores, factor, index % classes, deltas, priors[row]


def _rows(maps: Tensor) -> Tensor:
    """Shape (1, C, H, W) to (H, W, C)."""
    return maps[0].permute(1, 2, 0)


@contextlib.contextmanager
def _with_mask(outside: Tensor) -> Iterator[None]:
    """Let the hosts mask padding in an export, too.

    They leave masks out for one, and make them as ``masks =
    feat.new_ones(shape); masks[i, :height, :width] = 0``, which exporters
    write with the height and width that they have seen.

    Args:
        outside (Tensor): 1 in padding, 0 in the image, shape (1, H, W).
    """
    ones, write = Tensor.new_ones, Tensor.__setitem__

    def mask_or_ones(self: Tensor, size: tuple, *args, **options) -> Tensor:
        if size == tuple(outside.shape):
            return outside
        return ones(self, size, *args, **options)

    def keep_mask(self: Tensor, key: object, value: object) -> None:
        if self is not outside:
            write(self, key, value)

    with (
        mock.patch.object(torch.onnx, 'is_in_onnx_export', lambda: False),
        mock.patch.object(Tensor, 'new_ones', mask_or_ones),
        mock.patch.object(Tensor, '__setitem__', keep_mask),
    ):
        yield
