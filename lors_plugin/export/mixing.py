"""Adaptive mixing with sizes that do not depend on the images."""

from typing import Optional, Union

import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.mixing import AdaptiveMixing
from lors_plugin.lors.low_rank import LinearStack, LowRankLinearStack

EPS = 1e-5


class ExportMixing(nn.Module):
    """:class:`AdaptiveMixing` or :class:`LORSAdaptiveMixing` for export.

    Exporters must know over which sizes a norm runs; tensors of which the
    number of images is open do not say it.

    Args:
        source (nn.Module): Holds the weights.
    """

    def __init__(
        self, source: Union[AdaptiveMixing, LORSAdaptiveMixing]
    ) -> None:
        super().__init__()
        self.source = source

    def forward(
        self, x: Tensor, query: Tensor, stage: Optional[int] = None
    ) -> Tensor:
        """As the module that it stands for.

        Args:
            x (Tensor): Sampled features, shape (B, N, G, P, C).
            query (Tensor): Content of the queries, shape (B, N, D).
            stage (int, optional): Which stage calls, if they share weights.

        Returns:
            Tensor: Shape (B, N, D).
        """
        source, sizes = self.source, self.source.shape
        channel, spatial = self._matrices(query, stage)
        if stage is not None:
            cores = source.core_generators[stage](query).chunk(2, dim=-1)
            parts = [
                stack(core, stage)
                for stack, core in zip(
                    (source.channel_part, source.spatial_part), cores
                )
            ]
            channel, spatial = (
                _sum(matrix, part)
                for matrix, part in zip((channel, spatial), parts)
            )
        width = sizes.width
        y = F.layer_norm(x @ channel, (sizes.in_points, width), eps=EPS).relu()
        y = F.layer_norm(spatial @ y, (sizes.out_points, width), eps=EPS)
        mixed = y.relu().flatten(2)
        if stage is None:
            return source.out_proj(mixed)
        return _project(source.out_proj, mixed, stage)

    def _matrices(
        self, query: Tensor, stage: Optional[int]
    ) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Generated matrices (B, N, G, C, C) and (B, N, G, Q, P)."""
        generator, sizes = self.source.generator, self.source.shape
        if generator is None:
            return None, None
        if isinstance(generator, LinearStack):
            generator = generator[stage]
        numbers = generator(query).unflatten(-1, (sizes.groups, -1))
        square = sizes.width**2
        return (
            numbers[..., :square].unflatten(-1, (sizes.width, sizes.width)),
            numbers[..., square:].unflatten(
                -1, (sizes.out_points, sizes.in_points)
            ),
        )


def _project(
    stack: Union[LinearStack, LowRankLinearStack], x: Tensor, layer: int
) -> Tensor:
    """The stack's forward without its autograd function."""
    if isinstance(stack, LinearStack):
        return stack(x, layer)
    bias = None if stack.bias is None else stack.bias[layer]
    down, up = stack.down[layer], stack.up[layer]
    if stack.weight is None:
        return F.linear(F.linear(x, down), up, bias)
    out = F.linear(x, stack.weight, bias)
    if down.numel():
        out = out + F.linear(F.linear(x, down), up)
    return out


def _sum(matrix: Optional[Tensor], part: Optional[tuple]) -> Tensor:
    if part is None:
        return matrix
    return part.product() if matrix is None else matrix + part.product()
