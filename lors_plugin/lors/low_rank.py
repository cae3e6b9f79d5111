"""LORS: layers of a stack share most weights and keep a low-rank part.

Paper: `LORS: Low-rank Residual Structure for Parameter-Efficient Network
Stacking <https://arxiv.org/abs/2403.04303>`_, sections 3.2 and 3.3. Two
forms: :class:`LowRankLinearStack` for ordinary weights (static) and
:class:`AdaptiveLowRankStack` for weights that are made from a query.
"""

import math
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from lors_plugin.ops import LowRank
from lors_plugin.registry import MODELS
from lors_plugin.utils import per_layer

FAN_INS = ('stacked', 'matrix')


def _factor(*shape: int) -> nn.Parameter:
    """A parameter; one of rank 0 takes no part in training.

    It would never get a gradient, for which several processes wait.
    """
    return nn.Parameter(torch.empty(shape), requires_grad=0 not in shape)


class LinearStack(ModuleList):
    """A linear layer for each layer of a stack, with nothing shared."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """Apply layer number ``layer`` to ``x``, shape (..., in)."""
        return self[layer](x)


@MODELS.register_module()
class LowRankLinearStack(BaseModule):
    """One linear layer for each layer of a stack: LORS^T.

    Layer ``l`` has the weight ``W + sum_k B_lk A_lk`` with ``W`` shared by
    all and a bias of its own. The sum over ``K`` parameter groups of rank
    ``r`` is stored as one pair of factors of rank ``K r``. ``B`` starts at
    zero, so that the stack starts as one shared layer. The weight is never
    formed in :meth:`forward`.

    Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        num_layers (int): Number of layers in the stack.
        ranks (int | Sequence[int]): Rank of a parameter group, one value or
            one a layer. 0 leaves a layer without a private part.
        groups (int | Sequence[int]): Parameter groups. Defaults to 1.
        bias (bool): Whether layers have a bias. Defaults to True.
        with_shared (bool): Whether there is a shared weight. Without one,
            ``B`` starts as in ``nn.Linear``. Defaults to True.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_layers: int,
        ranks: Union[int, Sequence[int]],
        groups: Union[int, Sequence[int]] = 1,
        bias: bool = True,
        with_shared: bool = True,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        # Without a shared weight, rank 0 leaves a layer without any.
        ranks = per_layer('ranks', ranks, num_layers, int(not with_shared))
        groups = per_layer('groups', groups, num_layers)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = (
            nn.Parameter(torch.empty(out_features, in_features))
            if with_shared
            else None
        )
        totals = [k * r for k, r in zip(groups, ranks)]
        self.down = nn.ParameterList(
            _factor(total, in_features) for total in totals
        )
        self.up = nn.ParameterList(
            _factor(out_features, total) for total in totals
        )
        self.bias = (
            nn.ParameterList(torch.empty(out_features) for _ in totals)
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; Kaiming for ``A``, zero for ``B``."""
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        for down, up in zip(self.down, self.up):
            if down.numel():
                nn.init.kaiming_uniform_(down)
            if self.weight is not None:
                nn.init.zeros_(up)
            else:
                nn.init.kaiming_uniform_(up, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.in_features)
        for bias in self.bias or ():
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """Apply layer number ``layer``.

        Args:
            x (Tensor): Shape (..., in_features).
            layer (int): Which layer of the stack.

        Returns:
            Tensor: Shape (..., out_features).
        """
        bias = None if self.bias is None else self.bias[layer]
        down, up = self.down[layer], self.up[layer]
        if self.weight is None:
            return F.linear(F.linear(x, down), up, bias)
        out = F.linear(x, self.weight, bias)
        if down.numel():
            out = out + F.linear(F.linear(x, down), up)
        return out

    def layer_weight(self, layer: int) -> Tensor:
        """The full weight of a layer, shape (out_features, in_features)."""
        private = self.up[layer] @ self.down[layer]
        return private if self.weight is None else self.weight + private

    def extra_repr(self) -> str:
        ranks = [len(down) for down in self.down]
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, ranks={ranks}, '
            f'bias={self.bias is not None}, '
            f'with_shared={self.weight is not None}'
        )


@MODELS.register_module()
class AdaptiveLowRankStack(BaseModule):
    """Static factors of the low-rank part of generated matrices: LORS^A.

    Layer ``l`` adds ``sum_k left_lk E_lk(q) right_lk`` to a matrix that one
    shared generator makes from the query ``q``. The cores ``E`` come from
    outside (:attr:`core_sizes` numbers each); this module holds the factors.

    Args:
        rows (int): Rows of the generated matrix.
        cols (int): Columns of the generated matrix.
        num_layers (int): Number of layers in the stack.
        ranks (int | Sequence[int]): Rank of a parameter group, one value or
            one a layer. 0 leaves a layer without a private part.
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
        if fan_in not in FAN_INS:
            raise ValueError(f'fan_in={fan_in!r} must be one of {FAN_INS}')
        self.ranks = per_layer('ranks', ranks, num_layers, minimum=0)
        self.groups = per_layer('groups', groups, num_layers)
        self.copies = copies
        self.fan_in = fan_in
        self.left = nn.ParameterList(
            _factor(copies, k, rows, r)
            for k, r in zip(self.groups, self.ranks)
        )
        self.right = nn.ParameterList(
            _factor(copies, k, r, cols)
            for k, r in zip(self.groups, self.ranks)
        )
        self.reset_parameters()

    @property
    def core_sizes(self) -> list:
        """list[int]: Numbers in the cores of each layer, for one query."""
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
        """Factors of one layer.

        Args:
            core (Tensor): Numbers made from the queries, shape
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
