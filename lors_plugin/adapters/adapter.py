"""Adapters: what they share, and RepAdapter."""

import abc
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lors_plugin.utils import check_divisible, check_number

from .sites import INPUTS, NewWeight, SiteError, site_of


class Adapter(nn.Module, abc.ABC):
    """Base of adapters: a small module that a layer gets as a child.

    An adapter knows how it changes the calls of its layer, and with which
    weights the layer does the same alone. Its weights are plain parameters
    and not ``nn.Linear``: hosts initialise every ``nn.Linear`` of their
    blocks anew when training starts.

    Attributes:
        method (str): Name of the method in configs and files.
        child (str): Name of the adapter in its layer.
    """

    method: str
    child: str

    @classmethod
    @abc.abstractmethod
    def for_layer(cls, layer: nn.Module, **options: Any) -> 'Adapter':
        """Make an adapter that fits a layer.

        Args:
            layer (nn.Module): Without an adapter.
            **options: Of the method.

        Raises:
            SiteError: If the layer cannot have one.
        """

    @classmethod
    @abc.abstractmethod
    def from_state(
        cls,
        layer: nn.Module,
        state: dict[str, Tensor],
        scale: Optional[float] = None,
    ) -> 'Adapter':
        """Make an adapter with the shapes of given weights.

        Args:
            layer (nn.Module): Without an adapter.
            state (dict[str, Tensor]): State dict of an adapter.
            scale (float, optional): For files that hold none.

        Raises:
            ValueError: If the scale is missing.
        """

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor."""

    @abc.abstractmethod
    def check(self, layer: nn.Module) -> None:
        """Check that a layer can have this very adapter.

        Raises:
            SiteError: If not.
        """

    @abc.abstractmethod
    def register(
        self, layer: nn.Module, by: Optional[Callable] = None
    ) -> list[RemovableHandle]:
        """Register the hooks that change calls of a layer.

        Args:
            layer (nn.Module): Of the kind that :meth:`check` accepts.
            by (Callable, optional): What the hooks call, with the arguments
                of the adapter's ``forward``; by default the adapter.
        """

    @abc.abstractmethod
    def merged_weights(self, layer: nn.Module) -> list[NewWeight]:
        """Compute the weights with which a layer needs no adapter.

        Args:
            layer (nn.Module): Of the kind that :meth:`check` accepts.

        Returns:
            list[tuple]: Module, name of its parameter, value in float64.
        """

    @property
    @abc.abstractmethod
    def first_trained(self) -> nn.Parameter:
        """The parameter that has a gradient from the first step on."""

    def signature(self) -> tuple:
        """Describe shapes and layout."""
        shapes = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        return self.method, shapes


class AdapterHook:
    """Base of the hooks of adapters on modules.

    A hook holds its adapter: copies of a model (EMA) are made of the hooks,
    too, and use their own adapters.

    Args:
        adapter (Callable): The adapter, or what computes in its place.
    """

    def __init__(self, adapter: Callable) -> None:
        self.adapter = adapter


class InputHook(AdapterHook):
    """Adapt inputs of a module (a forward pre-hook).

    Args:
        adapter (Callable): The adapter, or what computes in its place.
        names (tuple[str]): Arguments to adapt; () for the first tensor.
    """

    def __init__(self, adapter: Callable, names: tuple = ()) -> None:
        super().__init__(adapter)
        self.names = names

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Return the arguments of a call, adapted."""
        if not self.names:
            if args:
                return (self.adapter(args[0]), *args[1:]), kwargs
            name = next(k for k in kwargs if isinstance(kwargs[k], Tensor))
            return args, {**kwargs, name: self.adapter(kwargs[name])}
        args, kwargs, done = list(args), dict(kwargs), []
        for index, name in enumerate(INPUTS.values()):
            if name not in self.names:
                continue
            place, key = (args, index) if index < len(args) else (kwargs, name)
            x = place[key]
            # What was one tensor stays one, which PyTorch computes faster.
            adapted = [new for old, new in done if old is x]
            place[key] = adapted[0] if adapted else self.adapter(x)
            done.append((x, place[key]))
        return tuple(args), kwargs


class RepAdapter(Adapter):
    """``f(x) = x + s * up(drop(down(x)))`` without an activation.

    Paper: `Towards Efficient Visual Adaption via Structural
    Re-parameterization <https://arxiv.org/abs/2302.08106>`_, section 3.2.
    ``down`` is dense, ``up`` works on ``groups`` slices of the channels. As
    ``f`` is affine, the linear layer behind it can swallow it
    (:meth:`affine`). ``up`` starts at zero, so a fresh adapter does nothing.

    Args:
        embed_dims (int): Channels ``d`` of the input.
        hidden_dims (int): Channels ``c`` between the maps. Defaults to 8.
        groups (int): Groups of ``up``. Defaults to 2.
        scale (float): ``s``, a task's own. Kept in the state dict, so that
            weights never meet another scale. Defaults to 1.
        dropout (float): Between the maps, while training. Defaults to 0.1.
        channel_dim (int): Where the channels are: -1 for tokens
            (..., d), 1 for maps (B, d, H, W). Defaults to -1.
        inputs (str): Which inputs of an attention are adapted, letters of
            'qkv'; '' before a layer with one input. Defaults to ''.
    """

    method = child = 'rep_adapter'

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        dropout: float = 0.1,
        channel_dim: int = -1,
        inputs: str = '',
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
        self.inputs = inputs
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

    @classmethod
    def for_layer(cls, layer: nn.Module, **options: Any) -> 'RepAdapter':
        """Make an adapter of a layer's input.

        Args:
            layer (nn.Module): One that ``sites.site_of`` knows.
            **options: Of the constructor besides what the layer says; and
                ``inputs``.
        """
        site = site_of(layer, options.pop('inputs', ''))
        return cls(
            site.channels,
            channel_dim=site.channel_dim,
            inputs=site.inputs,
            **options,
        )

    @classmethod
    def from_state(
        cls,
        layer: nn.Module,
        state: dict[str, Tensor],
        scale: Optional[float] = None,
    ) -> 'RepAdapter':
        """See the base class; the original program's layout is read too."""
        down, up = (
            state[new] if new in state else state[old]
            for new, old in (
                ('down_weight', 'conv_A.weight'),
                ('up_weight', 'conv_B.weight'),
            )
        )
        scale = state.get('scale', scale)
        if scale is None:
            raise ValueError('comes without its scale')
        return cls.for_layer(
            layer,
            hidden_dims=len(down),
            groups=len(down) // up.shape[1],
            scale=float(scale),
        )

    def options(self) -> dict[str, Any]:
        """Arguments that build such an adapter."""
        options = dict(
            embed_dims=self.embed_dims,
            hidden_dims=len(self.down_weight),
            groups=self.groups,
            scale=self.scale.item(),
            dropout=self.dropout,
            channel_dim=self.channel_dim,
        )
        return dict(options, inputs=self.inputs) if self.inputs else options

    def check(self, layer: nn.Module) -> None:
        """See the base class."""
        site = site_of(layer, self.inputs)
        if (site.channels, site.channel_dim, site.inputs) != (
            self.embed_dims,
            self.channel_dim,
            self.inputs,
        ):
            raise SiteError(
                f'it has {site.channels} channels, its adapter '
                f'{self.embed_dims}'
            )

    def register(
        self, layer: nn.Module, by: Optional[Callable] = None
    ) -> list[RemovableHandle]:
        """See the base class."""
        return [
            reader.module.register_forward_pre_hook(
                InputHook(by or self, reader.names), with_kwargs=True
            )
            for reader in site_of(layer, self.inputs).readers()
        ]

    def merged_weights(self, layer: nn.Module) -> list[NewWeight]:
        """See the base class."""
        return site_of(layer, self.inputs).absorb(*self.affine())

    @property
    def first_trained(self) -> nn.Parameter:
        """See the base class."""
        return self.up_bias

    def signature(self) -> tuple:
        """See the base class."""
        layout = (self.groups, self.channel_dim, self.inputs)
        return (*super().signature(), *layout)

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
        return ', '.join(f'{k}={v}' for k, v in self.options().items())

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
                    value = state_dict.pop(old)
                    if part == 'weight':
                        value = value.flatten(1)
                    state_dict[f'{prefix}{name}_{part}'] = value
                    state_dict.setdefault(f'{prefix}scale', self.scale.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
