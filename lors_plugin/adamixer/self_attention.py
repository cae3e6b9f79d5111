"""Self-attention among queries that knows how their boxes overlap."""

from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_divisible, check_number


@MODELS.register_module()
class BoxSelfAttention(BaseModule):
    """Multi-head self-attention with a bias from box geometry.

    Paper: `AdaMixer <https://arxiv.org/abs/2203.16507>`_, section 3.3. Head
    ``h`` adds ``t_h log(iof + 1e-7)`` to its logits, ``t_h`` learned.

    Args:
        embed_dims (int): Query width ``D``.
        num_heads (int): Number of heads. Defaults to 8.
        dropout (float): On attention weights. Defaults to 0.
        overlap_bias (bool): Whether there is the bias. Defaults to True.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        dropout: float = 0.0,
        overlap_bias: bool = True,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_divisible('embed_dims', embed_dims, 'num_heads', num_heads)
        self.num_heads = num_heads
        self.dropout = check_number('dropout', dropout, 0, 1)
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.overlap_scale = None
        if overlap_bias:
            self.overlap_scale = nn.Parameter(torch.empty(num_heads))
            nn.init.uniform_(self.overlap_scale, 0.0, 4.0)

    def init_weights(self) -> None:
        """Xavier, biases zero as in ``nn.MultiheadAttention``."""
        super().init_weights()
        for linear in (self.qkv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.overlap_scale is not None:
            nn.init.uniform_(self.overlap_scale, 0.0, 4.0)

    def forward(
        self, query: Tensor, overlap: Tensor, value: Optional[Tensor] = None
    ) -> Tensor:
        """Attend, without the residual.

        Args:
            query (Tensor): Shape (B, N, D).
            overlap (Tensor): Intersection over own area of all pairs of
                boxes, shape (B, N, N).
            value (Tensor, optional): What values are made from, shape
                (B, N, D). Defaults to ``query``.

        Returns:
            Tensor: Shape (B, N, D).
        """
        bias = None
        if self.overlap_scale is not None:
            scale = self.overlap_scale[:, None, None]
            bias = scale * torch.log(overlap + 1e-7)[:, None]
        qkv = self.qkv(query).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if value is not None:
            weight, shift = (x.chunk(3)[2] for x in self.qkv.parameters())
            v = F.linear(value, weight, shift)
            v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias if bias is None else bias.to(q.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.proj(out.transpose(1, 2).flatten(2))
