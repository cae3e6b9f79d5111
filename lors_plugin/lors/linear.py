"""LORS for ordinary weights (static): linear layers share most of theirs.

Paper: `LORS: Low-rank Residual Structure for Parameter-Efficient Network
Stacking <https://arxiv.org/abs/2403.04303>`_, section 3.2. Layer ``l`` of a
stack has the weight ``W + B_l A_l``, where ``W`` is shared. The sum over ``K``
parameter groups of rank ``r`` is one pair of factors of rank ``K r``.
:func:`low_rank_linear` is the computation. Two modules hold the weights:
:class:`LowRankResidualLinear` is one layer at its place in a model, and
:class:`LowRankLinearStack` all layers of a stack that one module calls.
"""

import math
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, per_layer


def low_rank_linear(
    x: Tensor,
    shared: Optional[Tensor],
    down: Optional[Tensor] = None,
    up: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
) -> Tensor:
    """Apply the weight ``W + B A`` and a bias; the sum is never formed.

    Args:
        x (Tensor): Shape (..., in).
        shared (Tensor, optional): ``W``, shape (out, in). None leaves the
            low-rank part alone.
        down (Tensor, optional): ``A``, shape (rank, in). None, like a rank
            of 0, leaves the shared weight alone.
        up (Tensor, optional): ``B``, shape (out, rank).
        bias (Tensor, optional): Shape (out, ).

    Returns:
        Tensor: Shape (..., out).
    """
    if shared is None:
        return F.linear(F.linear(x, down), up, bias)
    out = F.linear(x, shared, bias)
    if down is None or not down.numel():
        return out
    return out + F.linear(F.linear(x, down), up)


def factor(*shape: int) -> nn.Parameter:
    """Make a parameter; one of rank 0 takes no part in training.

    It would never get a gradient, for which several processes wait.
    """
    return nn.Parameter(torch.empty(shape), requires_grad=0 not in shape)


class LowRankResidualLinear(nn.Module):
    """A linear layer with the weight ``W + B A``, where ``W`` is shared.

    The first layer of a stack owns ``W``; the others look it up there
    whenever they need it, so that it stays one weight whatever is done to
    the model: it is saved once, counted once and optimized once, and copies
    of the model share a copy.

    It is no ``nn.Linear``: hosts initialise every one of those below their
    blocks anew, which would draw the shared weight once for each layer.

    Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        rank (int): Of the private part, ``K r``. 0 leaves it out.
        bias (bool): Whether there is a bias, always private. Defaults to
            True.
        owner (LowRankResidualLinear, optional): The layer whose weight is
            shared. By default this layer owns one.
        device (torch.device, optional): Of the weights. Defaults to None.
        dtype (torch.dtype, optional): Of the weights. Defaults to None.
    """

    # Behind the name of the layer, in the state dict of a plain model.
    plain_key = '.weight'

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        owner: Optional['LowRankResidualLinear'] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.in_features = check_at_least('in_features', in_features)
        self.out_features = check_at_least('out_features', out_features)
        self.rank = check_at_least('rank', rank, 0)

        def param(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # In a tuple it is no submodule, whose weight would be registered,
        # and saved, in every layer.
        self._owner = () if owner is None else (owner,)
        if owner is None:
            self.shared_weight = param(out_features, in_features)
        elif owner.shared.shape != (out_features, in_features):
            raise ValueError(
                f'a layer of {in_features} -> {out_features} cannot share '
                f'the weight of {owner}'
            )
        self.down = param(rank, in_features) if rank else None
        self.up = param(out_features, rank) if rank else None
        self.bias = param(out_features) if bias else None
        self.reset_parameters()

    @property
    def owner(self) -> 'LowRankResidualLinear':
        """LowRankResidualLinear: The layer that holds the shared weight."""
        return self._owner[0] if self._owner else self

    @property
    def shared(self) -> nn.Parameter:
        """nn.Parameter: ``W``, shape (out, in)."""
        return self.owner.shared_weight

    @property
    def weight(self) -> Tensor:
        """Tensor: The full weight, shape (out, in), formed when asked for.

        For hosts that read the weight of a layer instead of calling it.
        """
        return self.shared + self.up @ self.down if self.rank else self.shared

    def reset_parameters(self) -> None:
        """Draw ``A`` Kaiming-uniform, ``B`` zero, the rest as nn.Linear."""
        if not self._owner:
            nn.init.kaiming_uniform_(self.shared_weight, a=math.sqrt(5))
        if self.rank:
            nn.init.kaiming_uniform_(self.down)
            nn.init.zeros_(self.up)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x (Tensor): Shape (..., in).

        Returns:
            Tensor: Shape (..., out).
        """
        return low_rank_linear(x, self.shared, self.down, self.up, self.bias)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the same result, computed in float64."""
        weight = self.merged_weight()
        plain = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        plain.weight = weight
        if self.bias is not None:
            plain.bias.copy_(self.bias)
            plain.bias.requires_grad_(self.bias.requires_grad)
        return plain.train(self.training)

    @torch.no_grad()
    def merged_weight(self) -> nn.Parameter:
        """Form ``W + B A`` in float64, as a parameter of its usual dtype."""
        weight = self.shared.double()
        if self.rank:
            weight = weight + self.up.double() @ self.down.double()
        weight = weight.to(self.shared.dtype)
        return nn.Parameter(weight.clone(), self.shared.requires_grad)

    def extra_repr(self) -> str:
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, rank={self.rank}, '
            f'bias={self.bias is not None}, owns_weight={not self._owner}'
        )


class LinearStack(ModuleList):
    """A linear layer for each layer of a stack, with nothing shared."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """Apply layer number ``layer``."""
        return self[layer](x)


@MODELS.register_module()
class LowRankLinearStack(BaseModule):
    """Hold all layers of a stack: LORS^T, called by layer number.

    Every layer has a bias of its own. ``B`` starts at zero, so that the
    stack starts as one shared layer.

    Args:
        in_features (int): Width of the input.
        out_features (int): Width of the output.
        num_layers (int): Number of layers in the stack.
        ranks (int | Sequence[int]): Rank of a parameter group, one value or
            one per layer. 0 leaves a layer without a private part.
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
        check_at_least('in_features', in_features)
        check_at_least('out_features', out_features)
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
            factor(total, in_features) for total in totals
        )
        self.up = nn.ParameterList(
            factor(out_features, total) for total in totals
        )
        self.bias = (
            nn.ParameterList(torch.empty(out_features) for _ in totals)
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``A`` Kaiming-uniform, ``B`` zero, the rest as nn.Linear."""
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
        return low_rank_linear(x, self.weight, down, up, bias)

    def layer_weight(self, layer: int) -> Tensor:
        """Form the full weight of a layer, shape (out, in)."""
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
