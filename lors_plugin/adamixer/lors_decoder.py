"""AdaMixer's decoder with the mixing of all stages shared by LORS."""

from collections.abc import Sequence
from typing import Union

from torch import nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least

from .decoder import AdaMixerDecoder
from .lors_mixing import LORSAdaptiveMixing
from .mixing import MIXING_STEPS


@MODELS.register_module()
class LORSAdaMixerDecoder(AdaMixerDecoder):
    """AdaMixer's decoder, one mixing module for all stages.

    Paper: `LORS: Low-rank Residual Structure for Parameter-Efficient Network
    Stacking <https://arxiv.org/abs/2403.04303>`_, section 3.4. All other
    parts of a stage stay its own, so this differs from
    :class:`AdaMixerDecoder` in the mixing and nowhere else.

    Args:
        num_classes (int): Number of classes, without background.
        adaptive_ranks (int | Sequence[int]): Rank of the private part of
            the generated matrices, one value or one a stage; 0 for none.
        adaptive_groups (int | Sequence[int], optional): Parameter groups
            ``K``, one value or one a stage. By default they grow from 1 to
            3 with depth: the paper's 1 1 2 2 3 3 for six stages, 1 1 2 3
            for four.
        static_ranks (int | Sequence[int]): Rank of a parameter group of the
            output projection's private part, one value or one a stage; 0
            for none.
        static_groups (int | Sequence[int]): Parameter groups ``K`` of the
            output projection, one value or one a stage: ``K`` products of
            rank ``r`` are one of rank ``K r``. Defaults to 1.
        generator_init (str): 'zero', as the original program, or 'kaiming',
            as the paper, for the shared generator. Defaults to 'zero'.
        fan_in (str): 'stacked', as the original program, or 'matrix', for
            the Kaiming initialisation of the factors.
        adaptive_weights (str): 'lors' (shared and low-rank private),
            'private' (only the low-rank part) or 'full' (each stage its own,
            as in AdaMixer) for the generated matrices; for shared weights
            alone set the ranks to 0. Defaults to 'lors'.
        static_weights (str): The same for the output projection.
        **kwargs: See :class:`AdaMixerDecoder`; ``num_groups`` (2),
            ``in_points`` (64) and ``out_points`` (128) must be the same in
            all stages, since they share the mixing.
    """

    def __init__(
        self,
        num_classes: int,
        num_stages: int = 6,
        adaptive_ranks: Union[int, Sequence[int]] = 16,
        adaptive_groups: Union[int, Sequence[int], None] = None,
        static_ranks: Union[int, Sequence[int]] = 8,
        static_groups: Union[int, Sequence[int]] = 1,
        generator_init: str = 'zero',
        fan_in: str = 'stacked',
        adaptive_weights: str = 'lors',
        static_weights: str = 'lors',
        num_groups: Union[int, Sequence[int]] = 2,
        in_points: Union[int, Sequence[int]] = 64,
        **kwargs,
    ) -> None:
        check_at_least('num_stages', num_stages)
        if adaptive_groups is None:
            adaptive_groups = [
                1 + 3 * i // num_stages for i in range(num_stages)
            ]
        self._lors = dict(
            adaptive_ranks=adaptive_ranks,
            adaptive_groups=adaptive_groups,
            static_ranks=static_ranks,
            static_groups=static_groups,
            generator_init=generator_init,
            fan_in=fan_in,
            adaptive_weights=adaptive_weights,
            static_weights=static_weights,
        )
        super().__init__(
            num_classes,
            num_stages=num_stages,
            num_groups=num_groups,
            in_points=in_points,
            **kwargs,
        )

    def _build_mixing(self) -> nn.Module:
        for name, default in (
            ('mixing_steps', MIXING_STEPS), ('fixed_mixing', ())
        ):  # fmt: skip
            if getattr(self, name) != default:
                raise ValueError(
                    f'{name}={getattr(self, name)} is an ablation of '
                    'AdaMixer: it needs type="lors_plugin.AdaMixerDecoder"'
                )
        shared = {}
        for name in ('num_groups', 'in_points', 'out_points'):
            values = getattr(self, name)
            if len(set(values)) > 1:
                raise ValueError(
                    f'{name}={values} differs between stages, but all stages '
                    'of LORSAdaMixerDecoder share one mixing module; give '
                    'one value, or use type="lors_plugin.AdaMixerDecoder"'
                )
            shared[name] = values[0]
        return LORSAdaptiveMixing(
            self.num_stages,
            self.embed_dims,
            self.feat_channels,
            backend=self.backend,
            recompute=self.recompute_mixing,
            **shared,
            **self._lors,
        )
