"""AdaMixer's decoder: stages, losses, detections."""

from collections.abc import Sequence
from typing import Optional, Union

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, ModuleList
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.ops import share_levels
from lors_plugin.ops.backend import BACKENDS, keep_memory
from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    check_at_least,
    check_choice,
    check_divisible,
    check_number,
    check_positive,
    per_layer,
)

from .box_geometry import decode_boxes
from .criterion import SetCriterion
from .mixing import MIXING_STEPS, AdaptiveMixing, PrivateMixing, check_steps
from .norm import refuse_half
from .stage import AdaMixerStage

LORS_OPTIONS = (
    'adaptive_ranks',
    'adaptive_groups',
    'static_ranks',
    'static_groups',
    'generator_init',
    'fan_in',
    'adaptive_weights',
    'static_weights',
)


@MODELS.register_module()
class AdaMixerDecoder(BaseModule):
    """Stages that refine boxes and contents of queries.

    Paper: `AdaMixer: A Fast-Converging Query-Based Object Detector
    <https://arxiv.org/abs/2203.16507>`_, section 3. Options with "one a
    stage" take one value for all stages or a list.

    Args:
        num_classes (int): Number of classes, without background.
        num_stages (int): Number of stages ``L``. Defaults to 6.
        embed_dims (int): Query width ``D``. Defaults to 256.
        feat_channels (int, optional): Width of the feature levels. Defaults
            to ``embed_dims``.
        strides (Sequence[int]): Pixels a cell of each feature level.
        num_groups (int | Sequence[int]): Groups ``G``, one a stage.
        in_points (int | Sequence[int]): Sampled points a group ``P``, one a
            stage.
        out_points (int | Sequence[int]): Mixed points a group ``Q``, one a
            stage.
        num_heads (int | Sequence[int]): Attention heads, one a stage.
        feedforward_channels (int | Sequence[int]): Hidden width of the FFN,
            one a stage.
        num_cls_fcs (int): Hidden layers of the class branch. Defaults to 1.
        num_reg_fcs (int): Hidden layers of the box branch. Defaults to 1.
        dropout (float): Of attention and FFN. Defaults to 0.
        loss_cls (dict): Sigmoid focal loss.
        loss_bbox (dict): L1 loss on boxes in units of the image.
        loss_iou (dict): GIoU loss.
        with_cp (bool): Recompute each stage in the backward pass, which
            trades time for memory. Defaults to False.
        recompute_mixing (bool): Generate the matrices and mix again in the
            backward pass instead of keeping the matrices: less memory for
            less time than ``with_cp``, which covers it. Defaults to False.
        backend (str): 'auto', 'torch', 'triton' or 'reference', for the
            operators. Defaults to 'auto'.
        mixing_steps (Sequence[str]): What is mixed, in this order: the
            default ``('channel', 'spatial')``, the other order, or one of
            them (an ablation of the paper).
        fixed_mixing (Sequence[str]): Steps of mixing whose matrices are
            learned and the same for all queries instead of generated.
            Defaults to none.
        scale_offsets (bool): Whether points choose their scale; if not,
            sampling is 2D, at the scale of the box. Defaults to True.
        position_encoding (str): What gets the code of the boxes in
            self-attention: 'all' (queries, keys, values and the residual,
            as in the original program), 'query_key' or 'none'. Defaults to
            'all'.
        overlap_bias (bool): Whether self-attention has the bias by the
            overlap of boxes. Defaults to True.
        stage_loss_weights (float | Sequence[float]): Factor of the losses,
            one a stage. Defaults to 1.
        train_cfg (dict, optional): ``assigner``, matched in every stage.
        test_cfg (dict, optional): ``max_per_img``, the number of detections;
            as many as queries if not given.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        num_classes: int,
        num_stages: int = 6,
        embed_dims: int = 256,
        feat_channels: Optional[int] = None,
        strides: Sequence[int] = (4, 8, 16, 32),
        num_groups: Union[int, Sequence[int]] = 4,
        in_points: Union[int, Sequence[int]] = 32,
        out_points: Union[int, Sequence[int]] = 128,
        num_heads: Union[int, Sequence[int]] = 8,
        feedforward_channels: Union[int, Sequence[int]] = 2048,
        num_cls_fcs: int = 1,
        num_reg_fcs: int = 1,
        dropout: float = 0.0,
        loss_cls: Optional[dict] = None,
        loss_bbox: Optional[dict] = None,
        loss_iou: Optional[dict] = None,
        with_cp: bool = False,
        recompute_mixing: bool = False,
        backend: str = 'auto',
        mixing_steps: Sequence[str] = MIXING_STEPS,
        fixed_mixing: Sequence[str] = (),
        scale_offsets: bool = True,
        position_encoding: str = 'all',
        overlap_bias: bool = True,
        stage_loss_weights: Union[float, Sequence[float]] = 1.0,
        train_cfg: Optional[dict] = None,
        test_cfg: Optional[dict] = None,
        init_cfg: Optional[dict] = None,
        **unknown,
    ) -> None:
        super().__init__(init_cfg)
        self._refuse(unknown)
        check_at_least('num_classes', num_classes)
        check_at_least('num_stages', num_stages)
        check_at_least('num_cls_fcs', num_cls_fcs, 0)
        check_at_least('num_reg_fcs', num_reg_fcs, 0)
        check_choice('backend', backend, BACKENDS)
        for name, value in (('train_cfg', train_cfg), ('test_cfg', test_cfg)):
            if not isinstance(value, (dict, type(None))):
                raise ValueError(f'{name}={value!r} must be a dict')
        check_divisible('embed_dims', embed_dims, 'the 4 numbers of a box', 4)
        self.num_classes = num_classes
        self.num_stages = num_stages
        self.embed_dims = embed_dims
        if feat_channels is None:
            feat_channels = embed_dims
        self.feat_channels = check_at_least('feat_channels', feat_channels)
        self.strides = _check_strides(strides)
        self.backend = backend
        self.with_cp = with_cp
        self.recompute_mixing = recompute_mixing
        self.mixing_steps, self.fixed_mixing = check_steps(
            mixing_steps, fixed_mixing
        )
        self.max_per_img = ConfigDict(test_cfg or {}).get('max_per_img')
        if self.max_per_img is not None:
            check_at_least('test_cfg.max_per_img', self.max_per_img)

        self.num_groups = per_layer('num_groups', num_groups, num_stages)
        self.in_points = per_layer('in_points', in_points, num_stages)
        self.out_points = per_layer('out_points', out_points, num_stages)
        heads = per_layer('num_heads', num_heads, num_stages)
        hidden = per_layer(
            'feedforward_channels', feedforward_channels, num_stages
        )
        keep_memory()
        self.stages = ModuleList(
            [
                AdaMixerStage(
                    num_classes,
                    embed_dims,
                    self.num_groups[i],
                    self.in_points[i],
                    heads[i],
                    hidden[i],
                    num_cls_fcs,
                    num_reg_fcs,
                    dropout,
                    backend,
                    position_encoding,
                    overlap_bias,
                    scale_offsets,
                )
                for i in range(num_stages)
            ]
        )
        self.mixing = self._build_mixing()
        self.criterion = SetCriterion(
            num_classes,
            loss_cls,
            loss_bbox,
            loss_iou,
            ConfigDict(train_cfg or {}).get('assigner'),
            _check_loss_weights(stage_loss_weights, num_stages),
        )

    def _refuse(self, unknown: dict) -> None:
        """Say which options are wrong, and where they belong."""
        if not unknown:
            return
        lors = [name for name in unknown if name in LORS_OPTIONS]
        hint = (
            f'{lors} belong to type="lors_plugin.LORSAdaMixerDecoder"'
            if lors
            else 'see the docstring for the options there are'
        )
        raise TypeError(
            f'{type(self).__name__} has no option {sorted(unknown)}: {hint}'
        )

    def _build_mixing(self) -> nn.Module:
        """Build the mixing, which is called with the number of the stage."""
        return PrivateMixing(
            [
                AdaptiveMixing(
                    self.embed_dims,
                    self.feat_channels,
                    *sizes,
                    backend=self.backend,
                    recompute=self.recompute_mixing,
                    mixing_steps=self.mixing_steps,
                    fixed_mixing=self.fixed_mixing,
                )
                for sizes in zip(
                    self.num_groups, self.in_points, self.out_points
                )
            ]
        )

    def forward(
        self, feats: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run all stages.

        Args:
            feats (Sequence[Tensor]): Levels of shape (B, G C, H_l, W_l).
            content (Tensor): Initial contents, shape (B, N, D).
            xyzr (Tensor): Initial boxes, shape (B, N, 4).

        Returns:
            tuple[Tensor]: Of all L stages the class logits (L, B, N,
            classes), the corners of the boxes in pixels (L, B, N, 4), both
            in float32 at least, and the contents (L, B, N, D).
        """
        refuse_half(self)
        levels = share_levels(feats, self.backend)
        scores, boxes, contents = [], [], []
        for index, stage in enumerate(self.stages):

            def mix(x: Tensor, query: Tensor, stage: int = index) -> Tensor:
                return self.mixing(x, query, stage)

            if index:
                xyzr = xyzr.detach()
            inputs = levels, content, xyzr, self.strides, mix
            if self.with_cp and torch.is_grad_enabled():
                outs = checkpoint(stage, *inputs, use_reentrant=False)
            else:
                outs = stage(*inputs)
            cls_scores, xyzr, content = outs
            scores.append(cls_scores)
            boxes.append(decode_boxes(xyzr))
            contents.append(content)
        return torch.stack(scores), torch.stack(boxes), torch.stack(contents)

    def loss(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        batch_data_samples: list,
    ) -> dict:
        """Losses of all stages, each with a matching of its own.

        Args:
            feats, content, xyzr: As in :meth:`forward`.
            batch_data_samples (list[:obj:`DetDataSample`]): With
                ``gt_instances``.

        Returns:
            dict[str, Tensor]: ``stage{i}_loss_cls``, ``_bbox``, ``_iou``.
        """
        cls_scores, boxes, _ = self(feats, content, xyzr)
        return self.criterion(cls_scores, boxes, batch_data_samples)

    def predict(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        batch_data_samples: list,
        rescale: bool = True,
    ) -> list[InstanceData]:
        """The best (query, class) pairs of the last stage, without NMS.

        Args:
            feats, content, xyzr: As in :meth:`forward`.
            batch_data_samples (list[:obj:`DetDataSample`]): With
                ``scale_factor`` where ``rescale`` is set.
            rescale (bool): Give boxes in pixels of the original image.

        Returns:
            list[:obj:`InstanceData`]: For each image ``bboxes`` (n, 4),
            ``scores`` (n, ) and ``labels`` (n, ), best first.
        """
        cls_scores, boxes, _ = self(feats, content, xyzr)
        results = []
        for scores, corners, sample in zip(
            cls_scores[-1].sigmoid(), boxes[-1], batch_data_samples
        ):
            number = min(self.max_per_img or len(scores), scores.numel())
            scores, index = scores.flatten().topk(number)
            corners = corners[index // self.num_classes]
            if rescale:
                scale = corners.new_tensor(
                    sample.metainfo.get('scale_factor', (1.0, 1.0))
                )
                corners = corners / scale.repeat(2)
            results.append(
                InstanceData(
                    bboxes=corners,
                    scores=scores,
                    labels=index % self.num_classes,
                )
            )
        return results


def _check_strides(strides: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(strides, Sequence) or not strides:
        raise ValueError(f'strides={strides!r} must be one per feature level')
    return tuple(check_positive('strides', stride) for stride in strides)


def _check_loss_weights(
    weights: Union[float, Sequence[float]], num_stages: int
) -> list[float]:
    name = 'stage_loss_weights'
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        weights = [weights] * num_stages
    if len(weights) != num_stages:
        raise ValueError(
            f'{name}={weights} has {len(weights)} values for {num_stages} '
            'stages'
        )
    return [check_number(name, weight, 0) for weight in weights]
