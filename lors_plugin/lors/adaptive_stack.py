"""LORS for matrices that are generated from a query (adaptive).

Paper: `LORS: Low-rank Residual Structure for Parameter-Efficient Network
Stacking <https://arxiv.org/abs/2403.04303>`_, section 3.3. Ordinary weights
(static, section 3.2) are in :mod:`lors_plugin.lors.linear`.
"""

import math
from collections.abc import Sequence
from typing import Optional, Union

from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.ops import LowRank
from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice, per_layer

from .linear import factor

FAN_INS = ('stacked', 'matrix')


@MODELS.register_module()
class AdaptiveLowRankStack(BaseModule):
    """Hold the static factors of the low-rank part of generated matrices.

    LORS^A: layer ``l`` adds ``sum_k left_lk E_lk(q) right_lk`` to a matrix
    that one shared generator makes from the query ``q``. The cores ``E`` are
    an input; :attr:`core_sizes` tells their sizes.

    Args:
        rows (int): Rows of the generated matrix.
        cols (int): Columns of the generated matrix.
        num_layers (int): Number of layers in the stack.
        ranks (int | Sequence[int]): Rank of a parameter group, one value or
            one per layer. 0 leaves a layer without a private part.
        groups (int | Sequence[int]): Parameter groups ``K``.
        copies (int): Independent matrices side by side (``G`` groups of
            AdaMixer). Defaults to 1.
        fan_in (str): What Kaiming initialisation counts as fan-in: 'stacked'
            (the last two sizes multiplied, as the original program does) or
            'matrix' (the rank for ``left``, the columns for ``right``).
            Defaults to 'stacked'.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        num_layers: int,
        ranks: Union[int, Sequence[int]],
        groups: Union[int, Sequence[int]],
        copies: int = 1,
        fan_in: str = 'stacked',
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_choice('fan_in', fan_in, FAN_INS)
        check_at_least('rows', rows)
        check_at_least('cols', cols)
        check_at_least('copies', copies)
        self.ranks = per_layer('ranks', ranks, num_layers, minimum=0)
        self.groups = per_layer('groups', groups, num_layers)
        self.copies = copies
        self.fan_in = fan_in
        self.left = nn.ParameterList(
            factor(copies, k, rows, r) for k, r in zip(self.groups, self.ranks)
        )
        self.right = nn.ParameterList(
            factor(copies, k, r, cols) for k, r in zip(self.groups, self.ranks)
        )
        self.reset_parameters()

    @property
    def core_sizes(self) -> list:
        """list[int]: Elements of the cores of each layer, per query."""
        return [
            self.copies * k * r * r for k, r in zip(self.groups, self.ranks)
        ]

    def reset_parameters(self) -> None:
        """Kaiming-uniform, with the fan-in asked for."""
        for param in (*self.left, *self.right):
            if not param.numel():
                continue
            rows, cols = param.shape[-2:]
            fan_in = rows * cols if self.fan_in == 'stacked' else cols
            bound = math.sqrt(6 / fan_in)
            nn.init.uniform_(param, -bound, bound)

    def forward(self, core: Tensor, layer: int) -> Optional[LowRank]:
        """Combine the factors of one layer with the cores of the queries.

        Args:
            core (Tensor): Generated from the queries, shape
                (B, N, core_sizes[layer]).
            layer (int): Which layer of the stack.

        Returns:
            LowRank | None: The factors; None where the rank is 0.
        """
        num, rank = self.groups[layer], self.ranks[layer]
        if rank == 0:
            return None
        core = core.unflatten(-1, (self.copies, num, rank, rank))
        return LowRank(self.left[layer], core, self.right[layer])

    def extra_repr(self) -> str:
        return (
            f'copies={self.copies}, ranks={self.ranks}, '
            f'groups={self.groups}, fan_in={self.fan_in!r}'
        )
