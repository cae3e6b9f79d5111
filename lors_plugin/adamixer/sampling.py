"""Adaptive 3D sampling as a module."""

import math
from collections.abc import Sequence
from typing import Optional

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.ops import SharedLevels, sampling_3d
from lors_plugin.ops.backend import BACKENDS
from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice

from .box_geometry import box_sizes


@MODELS.register_module()
class AdaptiveSampling3D(BaseModule):
    """Sample features at points that each query chooses, in plane and scale.

    Paper: `AdaMixer <https://arxiv.org/abs/2203.16507>`_, section 3.1.

    Args:
        embed_dims (int): Query width ``D``.
        num_groups (int): Groups ``G``, each with points of its own.
        num_points (int): Points per group ``P``.
        backend (str): Of :func:`lors_plugin.ops.sampling_3d`.
        scale_offsets (bool): Whether points choose their scale. If not, all
            are sampled at the scale of the box: the paper's 2D sampling.
            Defaults to True.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_groups: int = 4,
        num_points: int = 32,
        backend: str = 'auto',
        scale_offsets: bool = True,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least('embed_dims', embed_dims)
        check_choice('backend', backend, BACKENDS)
        self.num_groups = check_at_least('num_groups', num_groups)
        self.num_points = check_at_least('num_points', num_points)
        self.backend = backend
        self.axes = 3 if scale_offsets else 2
        self.offsets = nn.Linear(
            embed_dims, num_groups * num_points * self.axes
        )

    def init_weights(self) -> None:
        """Start from a grid of cell centres, or at random where P is not a
        square number, one level finer than the box."""
        super().init_weights()
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.data.view(
            self.num_groups, self.num_points, self.axes
        )
        side = math.isqrt(self.num_points)
        if side**2 == self.num_points:
            centres = (torch.arange(side) + 0.5) / side - 0.5
            y, x = torch.meshgrid(centres, centres, indexing='ij')
            bias[..., 0], bias[..., 1] = x.flatten(), y.flatten()
        else:
            nn.init.uniform_(bias[..., :2], -0.5, 0.5)
        bias[..., 2:] = -1.0

    def points(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Sampling points.

        Args:
            content (Tensor): Shape (B, N, D).
            xyzr (Tensor): Boxes, shape (B, N, 4).

        Returns:
            Tensor: x and y in pixels and z in log2 of pixels, shape
            (B, N, G, P, 3), float32.
        """
        offsets = self.offsets(content).to(xyzr.dtype)
        offsets = offsets.unflatten(
            -1, (self.num_groups, self.num_points, self.axes)
        )
        boxes = xyzr[:, :, None, None]
        xy = boxes[..., :2] + offsets[..., :2] * box_sizes(boxes)
        if self.axes == 3:
            z = boxes[..., 2:3] + offsets[..., 2:]
        else:
            z = boxes[..., 2:3].expand_as(xy[..., :1])
        return torch.cat([xy, z], dim=-1)

    def forward(
        self,
        feats: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
        strides: Sequence[int],
    ) -> Tensor:
        """Sample all levels.

        Args:
            feats (Sequence[Tensor] | SharedLevels): Levels of shape
                (B, G C, H_l, W_l), or what
                :func:`lors_plugin.ops.share_levels` returns for them.
            content (Tensor): Content of the queries, shape (B, N, D).
            xyzr (Tensor): Boxes of the queries, shape (B, N, 4).
            strides (Sequence[int]): Pixels per cell of each level.

        Returns:
            Tensor: Shape (B, N, G, P, C).

        Raises:
            RuntimeError: If a stage runs under a checkpoint that goes back
                through the levels by itself.
        """
        if (
            isinstance(feats, SharedLevels)
            and feats.table.requires_grad
            and not torch.is_grad_enabled()
        ):
            raise RuntimeError(
                'levels that need a gradient are sampled without one, as in '
                "MMEngine's activation_checkpointing of a stage, which would "
                'run backward through the neck once per stage; set '
                'with_cp=True in the decoder instead'
            )
        points = self.points(content, xyzr)
        return sampling_3d(feats, points, strides, self.backend)
