"""AdaMixer's neck: every level to one width, nothing else."""

from collections.abc import Sequence
from typing import Optional

from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_divisible

from .norm import GroupNorm


@MODELS.register_module()
class SharedNormChannelMapping(BaseModule):
    """1x1 convolutions, then one GroupNorm that all levels share.

    MMDetection's ``ChannelMapper`` has a norm for each level, AdaMixer one
    for all: it is the same scale for every level that lets the decoder blend
    them (section 3.1 of `AdaMixer <https://arxiv.org/abs/2203.16507>`_).

    Args:
        in_channels (Sequence[int]): Channels of each backbone level.
        out_channels (int): Channels of every output level.
        num_norm_groups (int): Groups of the norm. Defaults to 32.
        init_cfg (dict, optional): As in MMEngine. Defaults to
            Xavier-uniform convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_norm_groups: int = 32,
        init_cfg: Optional[dict] = dict(  # noqa: B006
            type='Xavier', layer='Conv2d', distribution='uniform'
        ),
    ) -> None:
        super().__init__(init_cfg)
        check_divisible(
            'out_channels', out_channels, 'num_norm_groups', num_norm_groups
        )
        if not isinstance(in_channels, Sequence) or not in_channels:
            raise ValueError(
                f'in_channels={in_channels!r} must be a list, one per level'
            )
        self.in_channels = [
            check_at_least('in_channels', width) for width in in_channels
        ]
        self.out_channels = out_channels
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, out_channels, 1) for channels in in_channels
        )
        self.norm = GroupNorm(num_norm_groups, out_channels)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Map all levels.

        Args:
            feats (Sequence[Tensor]): Levels of shape (B, C_l, H_l, W_l).

        Returns:
            list[Tensor]: Levels of shape (B, out_channels, H_l, W_l),
            float32 also under autocast.

        Raises:
            ValueError: If the backbone gives other levels than configured.
        """
        channels = [feat.shape[1] for feat in feats]
        if channels != self.in_channels:
            raise ValueError(
                f'the backbone gives levels of {channels} channels but '
                f'neck.in_channels={self.in_channels}; set '
                f'neck.in_channels={channels} or other backbone.out_indices'
            )
        return [self.norm(conv(feat)) for conv, feat in zip(self.convs, feats)]
