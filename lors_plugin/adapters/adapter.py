"""RepAdapter: two linear maps that merge into the layer behind them."""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.utils import check_divisible, check_number


class RepAdapter(nn.Module):
    """``f(x) = x + s * up(drop(down(x)))`` without an activation.

    Paper: `Towards Efficient Visual Adaption via Structural
    Re-parameterization <https://arxiv.org/abs/2302.08106>`_, section 3.2.
    ``down`` is dense, ``up`` works on ``groups`` slices of the channels. As
    ``f`` is affine, the linear layer behind it can swallow it
    (:meth:`affine`). ``up`` starts at zero, so a fresh adapter does nothing.

    Weights are plain parameters and not ``nn.Linear``: hosts initialise every
    ``nn.Linear`` of their blocks anew when training starts.

    Args:
        embed_dims (int): Channels ``d`` of the input.
        hidden_dims (int): Channels ``c`` between the maps. Defaults to 8.
        groups (int): Groups of ``up``. Defaults to 2.
        scale (float): ``s``, a task's own. Kept in the state dict, so that
            weights never meet another scale. Defaults to 1.
        dropout (float): Between the maps, while training. Defaults to 0.1.
        channel_dim (int): Where the channels are: -1 for tokens
            (..., d), 1 for maps (B, d, H, W). Defaults to -1.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        dropout: float = 0.1,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        if channel_dim not in (-1, 1):
            raise ValueError(
                f'channel_dim={channel_dim} must be -1 (tokens) or 1 (maps)'
            )
        check_number('dropout', dropout, 0, 1)
        check_number('scale', scale)
        check_divisible('embed_dims', embed_dims, 'groups', groups)
        width = check_divisible('hidden_dims', hidden_dims, 'groups', groups)
        self.embed_dims = embed_dims
        self.groups = groups
        self.dropout = dropout
        self.channel_dim = channel_dim
        self.down_weight = nn.Parameter(torch.empty(hidden_dims, embed_dims))
        self.down_bias = nn.Parameter(torch.empty(hidden_dims))
        self.up_weight = nn.Parameter(torch.empty(embed_dims, width))
        self.up_bias = nn.Parameter(torch.empty(embed_dims))
        self.register_buffer('scale', torch.tensor(float(scale)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for ``down``, zero for all else."""
        nn.init.xavier_uniform_(self.down_weight)
        for param in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(param)

    def options(self) -> dict[str, Union[int, float]]:
        """Arguments that build such an adapter."""
        return dict(
            embed_dims=self.embed_dims,
            hidden_dims=len(self.down_weight),
            groups=self.groups,
            scale=self.scale.item(),
            dropout=self.dropout,
            channel_dim=self.channel_dim,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Adapt tokens or maps.

        Args:
            x (Tensor): Shape (..., d), or (B, d, H, W) for maps.

        Returns:
            Tensor: Same shape and dtype.
        """
        if self.channel_dim == 1:
            hidden = F.conv2d(
                x, self.down_weight[..., None, None], self.down_bias
            )
            hidden = F.dropout(hidden, self.dropout, self.training)
            delta = F.conv2d(
                hidden,
                self.up_weight[..., None, None],
                self.up_bias,
                groups=self.groups,
            )
        else:
            hidden = F.linear(x, self.down_weight, self.down_bias)
            hidden = F.dropout(hidden, self.dropout, self.training)
            delta = F.linear(hidden, self._dense_up(), self.up_bias)
        return x + (delta * self.scale).to(x.dtype)

    def _dense_up(self) -> Tensor:
        """``up`` as one matrix with zeros between groups, shape (d, c)."""
        if self.groups == 1:
            return self.up_weight
        return torch.block_diag(*self.up_weight.chunk(self.groups))

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        """The whole adapter as ``x @ matrix + offset``, without dropout.

        Returns:
            tuple[Tensor]: ``matrix`` (d, d) and ``offset`` (d, ), float64.
        """
        down, up = self.down_weight.double(), self._dense_up().double()
        scale = self.scale.double()
        matrix = scale * (up @ down).T
        matrix.diagonal().add_(1)
        offset = up @ self.down_bias.double() + self.up_bias.double()
        return matrix, scale * offset

    def extra_repr(self) -> str:
        if self.scale.is_meta:
            return f'{self.embed_dims}, without values'
        return ', '.join(f'{k}={v:g}' for k, v in self.options().items())

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args, **kwargs
    ) -> None:
        """Read the original program's layout too (one-dimensional convs).

        Its files carry no scale: the one given at building stays.
        """
        for name in ('down', 'up'):
            conv = {'down': 'conv_A', 'up': 'conv_B'}[name]
            for part in ('weight', 'bias'):
                old = f'{prefix}{conv}.{part}'
                if old in state_dict:
                    value: Optional[Tensor] = state_dict.pop(old)
                    if part == 'weight':
                        value = value.flatten(1)
                    state_dict[f'{prefix}{name}_{part}'] = value
                    state_dict.setdefault(f'{prefix}scale', self.scale.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
