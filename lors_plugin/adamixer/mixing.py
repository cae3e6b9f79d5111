"""Adaptive mixing of AdaMixer: generator, mixing, output projection."""

import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.ops import adaptive_mixing
from lors_plugin.ops.adaptive_mixing.reference import norm_relu
from lors_plugin.ops.backend import BACKENDS
from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    check_at_least,
    check_choice,
    check_divisible,
)

# Only mixing is implemented in C++.
MIXING_BACKENDS = (*BACKENDS, 'cpu')
MIXING_STEPS = ('channel', 'spatial')
NORM_EPS = 1e-5


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

    def matrix_size(self, step: str) -> int:
        """Count the elements of a matrix: ``C C`` or ``Q P``."""
        if step == 'channel':
            return self.width**2
        return self.out_points * self.in_points

    @property
    def num_generated(self) -> int:
        """int: Elements generated for one query, ``G (C C + Q P)``."""
        return self.groups * sum(map(self.matrix_size, MIXING_STEPS))

    @property
    def num_mixed(self) -> int:
        """int: Elements of one query after mixing, ``G Q C``."""
        return self.groups * self.out_points * self.width


def check_steps(
    steps: Sequence[str], fixed: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the steps of mixing, and which of them have fixed matrices.

    Raises:
        ValueError: If there are none, one twice, or others.
    """
    for name, value, choices in (
        ('mixing_steps', steps, MIXING_STEPS),
        ('fixed_mixing', fixed, steps),
    ):
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        unique = listed and all(
            x in choices and list(value).count(x) == 1 for x in value
        )
        if not unique or (name == 'mixing_steps' and not value):
            raise ValueError(
                f'{name}={value!r} must be a list of {list(choices)}, each '
                'at most once'
            )
    return tuple(steps), tuple(fixed)


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
        mixing_steps (Sequence[str]): What is mixed, in this order: 'channel'
            and 'spatial', or one of them. Other than the default, they are
            PyTorch's operators whatever the ``backend``.
        fixed_mixing (Sequence[str]): Steps whose matrices are learned and
            the same for all queries, instead of generated. Defaults to none.
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
        mixing_steps: Sequence[str] = MIXING_STEPS,
        fixed_mixing: Sequence[str] = (),
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
        self.steps, self.fixed = check_steps(mixing_steps, fixed_mixing)
        sizes = {step: self.shape.matrix_size(step) for step in self.steps}
        generated = sum(
            sizes[step] for step in sizes if step not in self.fixed
        )
        self.generator = None
        if generated:
            self.generator = nn.Linear(embed_dims, num_groups * generated)
        # Drawn as the bias of the generator, which a generator starts as.
        bound = 1 / math.sqrt(embed_dims)
        self.fixed_matrices = nn.ParameterDict(
            {
                step: nn.Parameter(
                    torch.empty(num_groups, sizes[step]).uniform_(
                        -bound, bound
                    )
                )
                for step in self.fixed
            }
        )
        num_mixed = self.shape.num_mixed
        if 'spatial' not in self.steps:
            num_mixed = feat_channels * in_points
        self.out_proj = nn.Linear(num_mixed, embed_dims)

    def init_weights(self) -> None:
        """Xavier for the projection; the generator starts as its bias."""
        super().init_weights()
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.generator is not None:
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
        """Generate the matrices and mix, shape (B, N, G, Q, C).

        It is (B, N, G, P, C) where only channels are mixed.
        """
        if self.steps == MIXING_STEPS and not self.fixed:
            weights = self.generator(query)
            weights = weights.unflatten(-1, (self.shape.groups, -1))
            return adaptive_mixing(x, weights, backend=self.backend)
        matrices = self.matrices(query)
        if self.steps == MIXING_STEPS:
            weights = torch.cat([matrices[step] for step in self.steps], -1)
            return adaptive_mixing(x, weights, backend=self.backend)
        for step in self.steps:
            if step == 'channel':
                matrix = matrices[step].unflatten(-1, (self.shape.width, -1))
                x = norm_relu(x @ matrix.to(x.dtype), NORM_EPS)
            else:
                size = self.shape.out_points, self.shape.in_points
                matrix = matrices[step].unflatten(-1, size)
                x = norm_relu(matrix.to(x.dtype) @ x, NORM_EPS)
        return x

    def matrices(self, query: Tensor) -> dict[str, Tensor]:
        """Matrices of each step, shape (B, N, G, C C) or (B, N, G, Q P)."""
        generated = [step for step in MIXING_STEPS if step in self.steps]
        generated = [step for step in generated if step not in self.fixed]
        shape = (*query.shape[:2], -1, -1)
        matrices = {k: v.expand(shape) for k, v in self.fixed_matrices.items()}
        if generated:
            weights = self.generator(query)
            weights = weights.unflatten(-1, (self.shape.groups, -1))
            sizes = [self.shape.matrix_size(step) for step in generated]
            matrices.update(zip(generated, weights.split(sizes, dim=-1)))
        return matrices


class PrivateMixing(ModuleList):
    """One :class:`AdaptiveMixing` per stage, called like the shared one."""

    def forward(self, x: Tensor, query: Tensor, stage: int) -> Tensor:
        """Mix and project as stage ``stage`` does."""
        return self[stage](x, query)
