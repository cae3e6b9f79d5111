"""The queries that the decoder starts from."""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice

from .box_geometry import boxes_from_sizes

INITIAL_BOXES = ('image', 'grid', 'learned')
# Of the image: a box that shrinks to nothing would never come back.
MIN_SIZE = 1e-3


@MODELS.register_module()
class InitialQueryGenerator(BaseModule):
    """Learned contents, and where their boxes start.

    Section 3.3 of `AdaMixer <https://arxiv.org/abs/2203.16507>`_: all
    queries start as the whole image. A grid of cells is our addition, for
    images full of objects of about the size of a cell, such as tiles of
    aerial photos: queries then have less far to go, and training is short.

    Args:
        num_queries (int): Number of queries ``N``. Defaults to 100.
        embed_dims (int): Query width ``D``. Defaults to 256.
        initial_boxes (str): 'image', as in the paper, or 'grid': the image
            is cut into as many columns as rows (or one more), and query
            ``i`` starts as cell ``i``, row by row; or 'learned': centre and
            size relative to the image, which start as the whole image and
            are learned. Defaults to 'image'.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        num_queries: int = 100,
        embed_dims: int = 256,
        initial_boxes: str = 'image',
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_choice('initial_boxes', initial_boxes, INITIAL_BOXES)
        check_at_least('num_queries', num_queries)
        check_at_least('embed_dims', embed_dims)
        self.num_queries = num_queries
        self.embed_dims = embed_dims
        self.initial_boxes = initial_boxes
        self.content = nn.Embedding(num_queries, embed_dims)
        self.boxes = None
        if initial_boxes == 'learned':
            self.boxes = nn.Embedding(num_queries, 4)
            self._reset_boxes()

    def init_weights(self) -> None:
        """Standard normal contents; learned boxes start as the image."""
        nn.init.normal_(self.content.weight)
        if self.boxes is not None:
            self._reset_boxes()
        super().init_weights()

    def _reset_boxes(self) -> None:
        nn.init.constant_(self.boxes.weight[:, :2], 0.5)
        nn.init.ones_(self.boxes.weight[:, 2:])

    def forward(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Make queries for a batch.

        Args:
            sizes (Tensor): Width and height of each image without padding,
                in pixels, shape (B, 2).

        Returns:
            tuple[Tensor]: Contents (B, N, D) and boxes (x, y, z, r) of
            shape (B, N, 4).
        """
        content = F.layer_norm(self.content.weight, (self.embed_dims,))
        sizes = sizes.to(content)
        if self.initial_boxes == 'grid':
            xyzr = self._grid(sizes)
        elif self.boxes is not None:
            boxes = self.boxes.weight * sizes[:, None].repeat(1, 1, 2)
            smallest = MIN_SIZE * sizes[:, None]
            xyzr = boxes_from_sizes(boxes[..., 2:].clamp(min=smallest))
            xyzr = torch.cat([boxes[..., :2], xyzr[..., 2:]], dim=-1)
        else:
            xyzr = boxes_from_sizes(sizes)[:, None]
        return (
            content.expand(sizes.shape[0], -1, -1),
            xyzr.expand(-1, self.num_queries, -1),
        )

    def _grid(self, sizes: Tensor) -> Tensor:
        """Cells of each image, shape (B, N, 4)."""
        columns = math.ceil(math.sqrt(self.num_queries))
        rows = math.ceil(self.num_queries / columns)
        index = torch.arange(self.num_queries, device=sizes.device)
        cell = sizes / sizes.new_tensor([columns, rows])
        place = torch.stack([index % columns, index // columns], -1) + 0.5
        xyzr = boxes_from_sizes(cell)[:, None].repeat(1, self.num_queries, 1)
        xyzr[..., :2] = place * cell[:, None]
        return xyzr
