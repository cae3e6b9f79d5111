"""A linear layer that shares its weight and keeps a low-rank part."""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankResidualLinear(nn.Module):
    """A linear layer with the weight ``W + B A``, where ``W`` is shared.

    LORS, section 3.2 (LORS^T). The first layer of a stack owns ``W``; the
    others look it up there whenever they need it, so that it stays one
    weight whatever is done to the model: it is saved once, counted once and
    optimized once, and copies of the model share a copy. The sum over ``K``
    parameter groups of rank ``r`` is one pair of factors of rank ``K r``.
    :meth:`forward` never forms the weight.

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
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank

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
        """Kaiming for ``W`` and ``A``, zero for ``B``; bias as nn.Linear."""
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
        out = F.linear(x, self.shared, self.bias)
        if self.rank:
            out = out + F.linear(F.linear(x, self.down), self.up)
        return out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the same result, computed in float64."""
        weight = self.shared.double()
        if self.rank:
            weight = weight + self.up.double() @ self.down.double()
        plain = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.shared.device,
            dtype=self.shared.dtype,
        )
        plain.weight.copy_(weight)
        plain.weight.requires_grad_(self.shared.requires_grad)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
            plain.bias.requires_grad_(self.bias.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, rank={self.rank}, '
            f'bias={self.bias is not None}, owns_weight={not self._owner}'
        )
