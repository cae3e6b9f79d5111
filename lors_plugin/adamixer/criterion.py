"""One-to-one matching and losses for the predictions of all stages."""

from collections.abc import Sequence
from typing import Optional

import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.dist import all_reduce, get_world_size
from mmengine.structures import InstanceData
from torch import Tensor, nn

from lors_plugin.utils import build_part

LOSS_CLS = dict(
    type='mmdet.FocalLoss',
    use_sigmoid=True,
    gamma=2.0,
    alpha=0.25,
    loss_weight=2.0,
)
LOSS_BBOX = dict(type='mmdet.L1Loss', loss_weight=5.0)
LOSS_IOU = dict(type='mmdet.GIoULoss', loss_weight=2.0)
ASSIGNER = dict(
    type='mmdet.HungarianAssigner',
    match_costs=[
        dict(type='mmdet.FocalLossCost', weight=2.0),
        dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xyxy'),
        dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
    ],
)


class SetCriterion(nn.Module):
    """Hungarian matching in every stage, then focal, L1 and GIoU losses.

    Section 3.4 of `AdaMixer <https://arxiv.org/abs/2203.16507>`_. All losses
    are divided by the mean number of boxes over processes, of which there
    is at least one in all; so several processes compute what one would on
    the same global batch, and a batch without boxes trains.

    Class targets are one-hot, which MMDetection's focal loss takes without
    a compiled operator on any device.

    Args:
        num_classes (int): Number of classes, without background.
        loss_cls (dict, optional): Defaults to sigmoid focal loss.
        loss_bbox (dict, optional): Defaults to L1 loss.
        loss_iou (dict, optional): Defaults to GIoU loss.
        assigner (dict, optional): Defaults to Hungarian matching with the
            costs and weights of the losses.
        stage_weights (Sequence[float], optional): Factor of the losses of
            each stage. Defaults to 1.
    """

    def __init__(
        self,
        num_classes: int,
        loss_cls: Optional[dict] = None,
        loss_bbox: Optional[dict] = None,
        loss_iou: Optional[dict] = None,
        assigner: Optional[dict] = None,
        stage_weights: Optional[Sequence[float]] = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stage_weights = stage_weights

        def build(name: str, cfg: Optional[dict], default: dict) -> nn.Module:
            cfg = default if cfg is None else cfg
            return build_part(name, MODELS.build, cfg)

        self.loss_cls = build('loss_cls', loss_cls, LOSS_CLS)
        self.loss_bbox = build('loss_bbox', loss_bbox, LOSS_BBOX)
        self.loss_iou = build('loss_iou', loss_iou, LOSS_IOU)
        assigner = ASSIGNER if assigner is None else assigner
        self.assigner = build_part('assigner', TASK_UTILS.build, assigner)

    def forward(
        self, cls_scores: Tensor, boxes: Tensor, batch_data_samples: list
    ) -> dict:
        """Match and compare all stages with the ground truth.

        Args:
            cls_scores (Tensor): Logits, shape (L, B, N, classes).
            boxes (Tensor): Corners in pixels, shape (L, B, N, 4).
            batch_data_samples (list[:obj:`DetDataSample`]): ``B`` samples
                with ``gt_instances``.

        Returns:
            dict[str, Tensor]: Three losses a stage.

        Raises:
            FloatingPointError: If a prediction, a matching cost or a loss
                is not finite; names the stage and the image.
            ValueError: If a label is negative or not below ``num_classes``.
        """
        self._check_labels(batch_data_samples)
        self._check_finite(
            'predictions', cls_scores, boxes, batch_data_samples
        )
        with torch.autocast(cls_scores.device.type, enabled=False):
            matched = [
                self._match(stage, scores, corners, batch_data_samples)
                for stage, (scores, corners) in enumerate(
                    zip(cls_scores.detach(), boxes.detach())
                )
            ]
            avg_factor = self._avg_factor(matched[0], boxes)
            losses = {}
            for stage, index in enumerate(matched):
                stage_losses = self._stage_losses(
                    cls_scores[stage],
                    boxes[stage],
                    index,
                    batch_data_samples,
                    avg_factor,
                )
                for name, value in stage_losses.items():
                    if self.stage_weights:
                        value = value * self.stage_weights[stage]
                    losses[f'stage{stage}_{name}'] = value
        self._check_losses(losses, batch_data_samples)
        return losses

    def _match(
        self, stage: int, cls_scores: Tensor, boxes: Tensor, samples: list
    ) -> list[tuple[Tensor, Tensor]]:
        """Indices of matched queries and of their boxes, for each image."""
        pairs = []
        for scores, corners, sample in zip(cls_scores, boxes, samples):
            try:
                result = self.assigner.assign(
                    pred_instances=InstanceData(scores=scores, bboxes=corners),
                    gt_instances=sample.gt_instances,
                    img_meta=sample.metainfo,
                )
            except ValueError as error:
                raise FloatingPointError(
                    f'matching costs of stage {stage} are not finite for '
                    f'image {_name(sample)} ({error}). {_HINT}'
                ) from error
            queries = (result.gt_inds > 0).nonzero().squeeze(1)
            pairs.append((queries, result.gt_inds[queries] - 1))
        return pairs

    @staticmethod
    def _avg_factor(pairs: list, like: Tensor) -> Tensor:
        """Mean number of boxes over processes; at least one in all."""
        total = like.new_tensor(
            float(sum(len(queries) for queries, _ in pairs))
        )
        all_reduce(total)
        return total.clamp(min=1.0) / get_world_size()

    def _stage_losses(
        self,
        cls_scores: Tensor,
        boxes: Tensor,
        pairs: list,
        samples: list,
        avg_factor: Tensor,
    ) -> dict:
        targets = torch.zeros_like(cls_scores)
        predicted, wanted, units = [], [], []
        for image, ((queries, index), sample) in enumerate(
            zip(pairs, samples)
        ):
            truth = sample.gt_instances
            targets[image, queries, truth.labels[index]] = 1.0
            predicted.append(boxes[image, queries])
            wanted.append(truth.bboxes[index].to(boxes))
            height, width = sample.metainfo['img_shape'][:2]
            units.append(
                boxes.new_tensor([width, height, width, height]).expand(
                    len(queries), 4
                )
            )
        predicted, wanted = torch.cat(predicted), torch.cat(wanted)
        units = torch.cat(units)
        return dict(
            loss_cls=self.loss_cls(
                cls_scores.flatten(0, 1),
                targets.flatten(0, 1),
                avg_factor=avg_factor,
            ),
            loss_bbox=self.loss_bbox(
                predicted / units, wanted / units, avg_factor=avg_factor
            ),
            loss_iou=self.loss_iou(predicted, wanted, avg_factor=avg_factor),
        )

    def _check_labels(self, samples: list) -> None:
        for sample in samples:
            labels = sample.gt_instances.labels
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(wrong):
                raise ValueError(
                    f'image {_name(sample)} has the label {int(wrong[0])}, '
                    f'but decoder.num_classes={self.num_classes} allows 0 to '
                    f'{self.num_classes - 1}; set num_classes to the number '
                    'of classes of the data'
                )

    @staticmethod
    def _check_finite(
        what: str, cls_scores: Tensor, boxes: Tensor, samples: list
    ) -> None:
        finite = cls_scores.isfinite().flatten(2).all(
            -1
        ) & boxes.isfinite().flatten(2).all(-1)
        if not finite.all():
            stage, image = (~finite).nonzero()[0].tolist()
            raise FloatingPointError(
                f'{what} of stage {stage} are not finite for image '
                f'{_name(samples[image])}. {_HINT}'
            )

    @staticmethod
    def _check_losses(losses: dict, samples: list) -> None:
        finite = torch.stack([loss.detach() for loss in losses.values()])
        finite = finite.isfinite()
        if not finite.all():
            name = list(losses)[(~finite).nonzero()[0].item()]
            raise FloatingPointError(
                f'{name} is not finite; images of the batch: '
                f'{", ".join(_name(sample) for sample in samples)}. {_HINT}'
            )


_HINT = (
    'Usual causes: a learning rate that is too high, no gradient '
    'clipping, float16 without loss scaling, or broken annotations'
)


def _name(sample) -> str:
    meta = sample.metainfo
    return str(meta.get('img_path') or meta.get('img_id') or 'without a name')
