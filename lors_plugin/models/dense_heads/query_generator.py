"""The queries that the decoder starts from."""

from typing import Optional

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS

from ..layers.box_geometry import boxes_from_sizes


@MODELS.register_module()
class InitialQueryGenerator(BaseModule):
    """Learned contents, all of them placed on the whole image.

    Section 3.3 of `AdaMixer <https://arxiv.org/abs/2203.16507>`_.

    Args:
        num_queries (int): Number of queries ``N``. Defaults to 100.
        embed_dims (int): Query width ``D``. Defaults to 256.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        num_queries: int = 100,
        embed_dims: int = 256,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_queries < 1:
            raise ValueError(f'num_queries={num_queries} must be at least 1')
        self.num_queries = num_queries
        self.embed_dims = embed_dims
        self.content = nn.Embedding(num_queries, embed_dims)

    def init_weights(self) -> None:
        """Standard normal contents."""
        super().init_weights()
        nn.init.normal_(self.content.weight)

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
        xyzr = boxes_from_sizes(sizes.to(content))
        batch = len(sizes)
        return (
            content.expand(batch, -1, -1),
            xyzr[:, None].repeat(1, self.num_queries, 1),
        )
