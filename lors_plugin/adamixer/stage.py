"""One stage of the decoder, in the order of the paper."""

import math
from collections.abc import Callable, Sequence
from typing import Optional

from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_choice

from .box_geometry import (
    box_position_encoding,
    intersection_over_foreground,
    refine_boxes,
)
from .norm import LayerNorm
from .sampling import AdaptiveSampling3D
from .self_attention import BoxSelfAttention

CLS_PRIOR = 0.01
POSITION_ENCODINGS = ('all', 'query_key', 'none')


@MODELS.register_module()
class AdaMixerStage(BaseModule):
    """Attend, sample, mix, think, and move the boxes.

    Paper: `AdaMixer <https://arxiv.org/abs/2203.16507>`_, figure 4. Mixing
    comes from outside, so that a stage does not know whether it shares it.

    Args:
        num_classes (int): Number of classes, without background.
        embed_dims (int): Query width ``D``.
        num_groups (int): Sampling groups ``G``.
        in_points (int): Sampled points a group ``P``.
        num_heads (int): Attention heads.
        feedforward_channels (int): Hidden width of the FFN.
        num_cls_fcs (int): Linear layers of the class branch.
        num_reg_fcs (int): Linear layers of the box branch.
        dropout (float): Of attention and FFN.
        backend (str): Of :func:`lors_plugin.ops.sampling_3d`.
        position_encoding (str): Where the attention gets it, see
            :class:`AdaMixerDecoder`. Defaults to 'all'.
        overlap_bias (bool): Of :class:`BoxSelfAttention`. Defaults to True.
        scale_offsets (bool): Of :class:`AdaptiveSampling3D`. Defaults to
            True.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int,
        num_groups: int,
        in_points: int,
        num_heads: int,
        feedforward_channels: int,
        num_cls_fcs: int,
        num_reg_fcs: int,
        dropout: float,
        backend: str = 'auto',
        position_encoding: str = 'all',
        overlap_bias: bool = True,
        scale_offsets: bool = True,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        self.embed_dims = embed_dims
        check_choice(
            'position_encoding', position_encoding, POSITION_ENCODINGS
        )
        self.position_encoding = position_encoding
        self.attention = BoxSelfAttention(
            embed_dims, num_heads, dropout, overlap_bias
        )
        self.attention_norm = LayerNorm(embed_dims)
        self.sampling = AdaptiveSampling3D(
            embed_dims, num_groups, in_points, backend, scale_offsets
        )
        self.mixing_norm = LayerNorm(embed_dims)
        self.ffn = FFN(
            embed_dims,
            feedforward_channels,
            act_cfg=dict(type='ReLU', inplace=True),
            ffn_drop=dropout,
        )
        self.ffn_norm = LayerNorm(embed_dims)
        self.cls_branch = self._branch(num_cls_fcs)
        self.fc_cls = nn.Linear(embed_dims, num_classes)
        self.reg_branch = self._branch(num_reg_fcs)
        self.fc_reg = nn.Linear(embed_dims, 4)

    def _branch(self, num_fcs: int) -> nn.Sequential:
        layers = []
        for _ in range(num_fcs):
            layers += [
                nn.Linear(self.embed_dims, self.embed_dims),
                LayerNorm(self.embed_dims),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def init_weights(self) -> None:
        """Xavier for all linears, then what each part asks for."""
        super().init_weights()
        for module in self.modules():
            # Offsets start from a grid, not from random directions.
            if (
                isinstance(module, nn.Linear)
                and module is not self.sampling.offsets
            ):
                nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(
            self.fc_cls.bias, -math.log((1 - CLS_PRIOR) / CLS_PRIOR)
        )
        nn.init.zeros_(self.fc_reg.weight)
        nn.init.zeros_(self.fc_reg.bias)

    def forward(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        strides: Sequence[int],
        mixing: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine the queries once.

        Args:
            feats (Sequence[Tensor] | SharedLevels): Levels of shape
                (B, G C, H_l, W_l), or what
                :func:`lors_plugin.ops.share_levels` returns for them.
            content (Tensor): Content of the queries, shape (B, N, D).
            xyzr (Tensor): Boxes of the queries, shape (B, N, 4). They get a
                gradient by the new boxes and by the points alone.
            strides (Sequence[int]): Pixels a cell of each level.
            mixing (Callable): Takes sampled features (B, N, G, P, C) and
                contents (B, N, D), returns (B, N, D).

        Returns:
            tuple[Tensor]: Class logits (B, N, classes) and boxes (B, N, 4)
            in float32 at least, and the new content (B, N, D).
        """
        # Boxes have a gradient in the first stage, if they are learned.
        fixed = xyzr.detach()
        overlap = intersection_over_foreground(fixed)
        query, value = content, None
        if self.position_encoding != 'none':
            query = content + box_position_encoding(fixed, self.embed_dims)
        if self.position_encoding == 'query_key':
            value = content
        else:
            content = query
        content = self.attention_norm(
            content + self.attention(query, overlap, value)
        )

        sampled = self.sampling(feats, content, xyzr, strides)
        content = self.mixing_norm(content + mixing(sampled, content))

        content = self.ffn_norm(self.ffn(content))

        cls_scores = self.fc_cls(self.cls_branch(content))
        delta = self.fc_reg(self.reg_branch(content))
        return cls_scores.to(xyzr.dtype), refine_boxes(xyzr, delta), content
