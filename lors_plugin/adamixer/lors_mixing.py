"""Adaptive mixing that all stages of a decoder share by LORS."""

from collections.abc import Sequence
from typing import Optional, Union

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.lors import (
    AdaptiveLowRankStack,
    LinearStack,
    LowRankLinearStack,
)
from lors_plugin.ops import adaptive_mixing
from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice, per_layer

from .mixing import MIXING_BACKENDS, MixingShape, recomputed

GENERATOR_INITS = ('zero', 'kaiming')
WEIGHT_FORMS = ('lors', 'private', 'full')


@MODELS.register_module()
class LORSAdaptiveMixing(BaseModule):
    """Adaptive mixing whose stages share all but a low-rank part.

    Paper: `LORS <https://arxiv.org/abs/2403.04303>`_, section 3.4. The
    matrices of stage ``l`` are ``M(q) + sum_k ml_lk E_lk(q) mr_lk`` and
    ``S(q) + sum_k sl_lk F_lk(q) sr_lk``; the output projection is
    ``W + B_l A_l`` with a bias of the stage.

    Args:
        num_stages (int): Stages that share the module.
        embed_dims (int): Query width ``D``.
        feat_channels (int): Width ``G C`` of the sampled features.
        num_groups (int): Groups ``G``. Defaults to 2.
        in_points (int): Sampled points per group ``P``. Defaults to 64.
        out_points (int): Mixed points per group ``Q``. Defaults to 128.
        adaptive_ranks (int | Sequence[int]): Rank of the generated
            matrices' private part, one value or one per stage; 0 for none.
        adaptive_groups (int | Sequence[int]): Parameter groups ``K``.
        static_ranks (int | Sequence[int]): Rank of a parameter group of the
            output projection's private part; 0 for none.
        static_groups (int | Sequence[int]): Parameter groups ``K`` of the
            output projection. Defaults to 1.
        generator_init (str): 'zero' (the original program) or 'kaiming'
            (the paper) for the shared generator. Defaults to 'zero'.
        fan_in (str): See :class:`AdaptiveLowRankStack`.
        adaptive_weights (str): Of the generated matrices: 'lors' (shared and
            low-rank private), 'private' (only the low-rank part) or 'full'
            (a generator for each stage, as in AdaMixer; ranks are not used).
            Shared weights alone are ranks of 0. Defaults to 'lors'.
        static_weights (str): The same for the output projection.
        backend (str): Of :func:`lors_plugin.ops.adaptive_mixing`.
        recompute (bool): Generate and mix again in the backward pass instead
            of keeping the matrices, half of what training keeps. Defaults to
            False.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        num_stages: int = 6,
        embed_dims: int = 256,
        feat_channels: int = 256,
        num_groups: int = 2,
        in_points: int = 64,
        out_points: int = 128,
        adaptive_ranks: Union[int, Sequence[int]] = 16,
        adaptive_groups: Union[int, Sequence[int]] = 1,
        static_ranks: Union[int, Sequence[int]] = 8,
        static_groups: Union[int, Sequence[int]] = 1,
        generator_init: str = 'zero',
        fan_in: str = 'stacked',
        adaptive_weights: str = 'lors',
        static_weights: str = 'lors',
        backend: str = 'auto',
        recompute: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        for name, value, choices in (
            ('generator_init', generator_init, GENERATOR_INITS),
            ('adaptive_weights', adaptive_weights, WEIGHT_FORMS),
            ('static_weights', static_weights, WEIGHT_FORMS),
            ('backend', backend, MIXING_BACKENDS),
        ):
            check_choice(name, value, choices)
        check_at_least('num_stages', num_stages)
        check_at_least('embed_dims', embed_dims)
        # Without shared weights, rank 0 leaves a stage without any.
        adaptive_ranks = per_layer(
            'adaptive_ranks',
            0 if adaptive_weights == 'full' else adaptive_ranks,
            num_stages,
            minimum=int(adaptive_weights == 'private'),
        )
        adaptive_groups = per_layer(
            'adaptive_groups', adaptive_groups, num_stages
        )
        static_ranks = per_layer(
            'static_ranks',
            static_ranks,
            num_stages,
            minimum=int(static_weights == 'private'),
        )
        static_groups = per_layer('static_groups', static_groups, num_stages)
        self.generator_init = generator_init
        self.backend = backend
        self.recompute = recompute
        self.shape = MixingShape(
            feat_channels, num_groups, in_points, out_points
        )
        width = self.shape.width
        self.generator = None
        if adaptive_weights == 'full':
            self.generator = LinearStack(
                [
                    nn.Linear(embed_dims, self.shape.num_generated)
                    for _ in range(num_stages)
                ]
            )
        elif adaptive_weights == 'lors':
            self.generator = nn.Linear(embed_dims, self.shape.num_generated)
        self.channel_part = AdaptiveLowRankStack(
            width,
            width,
            num_stages,
            adaptive_ranks,
            adaptive_groups,
            num_groups,
            fan_in,
        )
        self.spatial_part = AdaptiveLowRankStack(
            out_points,
            in_points,
            num_stages,
            adaptive_ranks,
            adaptive_groups,
            num_groups,
            fan_in,
        )
        self.core_generators = nn.ModuleList(
            nn.Linear(embed_dims, 2 * size)
            for size in self.channel_part.core_sizes
        )
        for linear in self.core_generators:
            # Of rank 0: never gets a gradient, so no process may wait for one.
            linear.requires_grad_(linear.out_features > 0)
        if static_weights == 'full':
            self.out_proj = LinearStack(
                [
                    nn.Linear(self.shape.num_mixed, embed_dims)
                    for _ in range(num_stages)
                ]
            )
        else:
            self.out_proj = LowRankLinearStack(
                self.shape.num_mixed,
                embed_dims,
                num_stages,
                static_ranks,
                static_groups,
                with_shared=static_weights == 'lors',
            )

    def init_weights(self) -> None:
        """Start so that a fresh stack does the same in every stage.

        Where weights are not shared it cannot: a projection of a stage
        starts as in AdaMixer, and cores that stand alone start as the unit
        matrix. Cores of zeros would make matrices of zeros, behind whose
        LayerNorm and ReLU no gradient ever comes back.
        """
        super().init_weights()
        generators = self.generator
        if isinstance(generators, nn.Linear):
            generators = [generators]
        for linear in generators or ():
            if self.generator_init == 'zero':
                nn.init.zeros_(linear.weight)
            else:
                nn.init.kaiming_uniform_(linear.weight)
        for linear, rank in zip(self.core_generators, self.channel_part.ranks):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            if self.generator is None:
                with torch.no_grad():
                    linear.bias.view(-1, rank, rank).copy_(torch.eye(rank))
        if isinstance(self.out_proj, LinearStack):
            for linear in self.out_proj:
                nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, query: Tensor, stage: int) -> Tensor:
        """Mix and project as stage ``stage`` does, without the residual.

        Args:
            x (Tensor): Sampled features, shape (B, N, G, P, C).
            query (Tensor): Content of the queries, shape (B, N, D).
            stage (int): Number of the stage.

        Returns:
            Tensor: Shape (B, N, D).
        """
        if self.recompute:
            mixed = recomputed(self.mix, x, query, stage)
        else:
            mixed = self.mix(x, query, stage)
        return self.out_proj(mixed.flatten(2), stage)

    def mix(self, x: Tensor, query: Tensor, stage: int) -> Tensor:
        """Generate the matrices and mix, shape (B, N, G, Q, C)."""
        cores = self.core_generators[stage](query)
        channel_core, spatial_core = cores.chunk(2, dim=-1)
        parts = [
            self.channel_part(channel_core, stage),
            self.spatial_part(spatial_core, stage),
        ]
        if self.generator is None:
            # There is nothing to add the parts to: they are the matrices.
            products = [part.product().flatten(-2) for part in parts]
            weights = torch.cat(products, dim=-1)
            return adaptive_mixing(x, weights, backend=self.backend)
        if isinstance(self.generator, LinearStack):
            weights = self.generator(query, stage)
        else:
            weights = self.generator(query)
        weights = weights.unflatten(-1, (self.shape.groups, -1))
        return adaptive_mixing(x, weights, *parts, backend=self.backend)
