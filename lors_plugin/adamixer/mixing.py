"""Adaptive mixing of AdaMixer: generator, mixing, output projection."""

from collections.abc import Callable
from typing import Optional

from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.ops import adaptive_mixing
from lors_plugin.ops.backend import BACKENDS
from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    check_at_least,
    check_choice,
    check_divisible,
)

# Only mixing is implemented in C++.
MIXING_BACKENDS = (*BACKENDS, 'cpu')


class MixingShape:
    """Sizes of adaptive mixing, and of what is generated for it.

    Args:
        feat_channels (int): Width ``G C`` of the sampled features.
        num_groups (int): ``G``.
        in_points (int): ``P``, sampled points per group.
        out_points (int): ``Q``, mixed points per group.
    """

    def __init__(
        self,
        feat_channels: int,
        num_groups: int,
        in_points: int,
        out_points: int,
    ) -> None:
        self.groups = num_groups
        self.width = check_divisible(
            'feat_channels', feat_channels, 'num_groups', num_groups
        )
        self.in_points = check_at_least('in_points', in_points)
        self.out_points = check_at_least('out_points', out_points)

    @property
    def num_generated(self) -> int:
        """int: Elements generated for one query, ``G (C C + Q P)``."""
        return self.groups * (self.width**2 + self.out_points * self.in_points)

    @property
    def num_mixed(self) -> int:
        """int: Elements of one query after mixing, ``G Q C``."""
        return self.groups * self.out_points * self.width


def recomputed(function: Callable, *args) -> Tensor:
    """Call ``function``, and again in the backward pass, which keeps its
    inputs instead of what it computes. Nothing in it may be random."""
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False
    )


@MODELS.register_module()
class AdaptiveMixing(BaseModule):
    """Adaptive channel and spatial mixing of one AdaMixer stage.

    Paper: `AdaMixer: A Fast-Converging Query-Based Object Detector
    <https://arxiv.org/abs/2203.16507>`_, section 3.2.

    Args:
        embed_dims (int): Query width ``D``.
        feat_channels (int): Width ``G C`` of the sampled features.
        num_groups (int): Groups ``G``. Defaults to 4.
        in_points (int): Sampled points per group ``P``. Defaults to 32.
        out_points (int): Mixed points per group ``Q``. Defaults to 128.
        backend (str): Of :func:`lors_plugin.ops.adaptive_mixing`.
        recompute (bool): Generate and mix again in the backward pass instead
            of keeping the matrices, half of what training keeps. Defaults to
            False.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        feat_channels: int = 256,
        num_groups: int = 4,
        in_points: int = 32,
        out_points: int = 128,
        backend: str = 'auto',
        recompute: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least('embed_dims', embed_dims)
        check_choice('backend', backend, MIXING_BACKENDS)
        self.shape = MixingShape(
            feat_channels, num_groups, in_points, out_points
        )
        self.backend = backend
        self.recompute = recompute
        self.generator = nn.Linear(embed_dims, self.shape.num_generated)
        self.out_proj = nn.Linear(self.shape.num_mixed, embed_dims)

    def init_weights(self) -> None:
        """Xavier for the projection; the generator starts as its bias."""
        super().init_weights()
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.generator.weight)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """Mix and project, without the residual.

        Args:
            x (Tensor): Sampled features, shape (B, N, G, P, C).
            query (Tensor): Content of the queries, shape (B, N, D).

        Returns:
            Tensor: Shape (B, N, D).
        """
        if self.recompute:
            mixed = recomputed(self.mix, x, query)
        else:
            mixed = self.mix(x, query)
        return self.out_proj(mixed.flatten(2))

    def mix(self, x: Tensor, query: Tensor) -> Tensor:
        """Generate the matrices and mix, shape (B, N, G, Q, C)."""
        weights = self.generator(query).unflatten(-1, (self.shape.groups, -1))
        return adaptive_mixing(x, weights, backend=self.backend)


class PrivateMixing(ModuleList):
    """One :class:`AdaptiveMixing` per stage, called like the shared one."""

    def forward(self, x: Tensor, query: Tensor, stage: int) -> Tensor:
        """Mix and project as stage ``stage`` does."""
        return self[stage](x, query)
