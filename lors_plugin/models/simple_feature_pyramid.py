"""ViTDet's neck: feature levels from the one map of a plain ViT."""

import math
from collections.abc import Sequence
from typing import Optional

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice, check_divisible

SCALES = (4, 2, 1, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Make levels of several scales from the last map of a plain backbone.

    Paper: `ViTDet <https://arxiv.org/abs/2203.16527>`_, section 3: one or
    two transposed convolutions enlarge the map, max-pooling makes it smaller;
    a 1x1 and a 3x3 convolution follow, each with a norm, at every level.

    Args:
        in_channels (int): Channels ``C`` of the map; a multiple of the
            largest scale.
        out_channels (int): Channels of every output level. Defaults to 256.
        scales (Sequence[float]): Size of each level relative to the map,
            some of 4, 2, 1, 0.5. The backbone's stride divided by a scale is
            the stride of its level. Defaults to all of them.
        num_outs (int, optional): Number of output levels; those behind the
            scales are made by taking every other cell of the last one, for
            detectors with coarser levels. Defaults to the number of scales.
        norm_cfg (dict): Norm of all layers. Defaults to LayerNorm over the
            channels, by MMPretrain.
        init_cfg (dict, optional): As in MMEngine. Defaults to Xavier-uniform
            convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = SCALES,
        num_outs: Optional[int] = None,
        norm_cfg: dict = dict(type='mmpretrain.LN2d', eps=1e-6),  # noqa: B006
        init_cfg: Optional[dict] = dict(  # noqa: B006
            type='Xavier',
            layer=['Conv2d', 'ConvTranspose2d'],
            distribution='uniform',
        ),
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(scales, Sequence) or not scales:
            raise ValueError(
                f'scales={scales!r} must be a list, one per level'
            )
        self.out_channels = check_at_least('out_channels', out_channels)
        self.num_outs = len(scales) if num_outs is None else num_outs
        check_at_least('num_outs', self.num_outs, len(scales))
        self.in_channels = check_at_least('in_channels', in_channels)
        for scale in scales:
            check_choice('scales', scale, SCALES)
        largest = math.ceil(max(scales))
        check_divisible('in_channels', in_channels, 'max(scales)', largest)
        self.levels = nn.ModuleList()
        for scale in scales:
            resize, channels = _resize(in_channels, scale, norm_cfg)
            options = dict(norm_cfg=norm_cfg, act_cfg=None)
            self.levels.append(
                nn.Sequential(
                    *resize,
                    ConvModule(channels, out_channels, 1, **options),
                    ConvModule(
                        out_channels, out_channels, 3, padding=1, **options
                    ),
                )
            )

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the levels.

        Args:
            feats (Sequence[Tensor]): The last is used, of shape (B, C, H, W).

        Returns:
            tuple[Tensor]: Levels of shape (B, out_channels, H s, W s) for
            each scale s, then those that are made smaller.

        Raises:
            ValueError: If the backbone gives no such map.
        """
        feat = feats[-1]
        if feat.dim() != 4 or feat.shape[1] != self.in_channels:
            raise ValueError(
                f'the backbone gives an output of shape {tuple(feat.shape)} '
                f'but the neck wants (B, {self.in_channels}, H, W); set '
                'neck.in_channels, and backbone.out_type="featmap" of a '
                'vision transformer of MMPretrain'
            )
        levels = [level(feat) for level in self.levels]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)


def _resize(
    channels: int, scale: float, norm_cfg: dict
) -> tuple[list[nn.Module], int]:
    """Layers that change the size of a map, and the channels they give."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(channels, channels // 2, 2, stride=2),
            build_norm_layer(norm_cfg, channels // 2)[1],
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, 2, stride=2),
        ], channels // 4
    if scale == 2:
        return [
            nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
        ], channels // 2
    if scale == 0.5:
        return [nn.MaxPool2d(2, 2)], channels
    return [], channels
