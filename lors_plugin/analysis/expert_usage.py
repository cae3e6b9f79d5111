"""Which experts dynamic layers use, and whether only one is left.

Shapes: ``B`` images, ``M`` experts.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Optional

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from lors_plugin.parameternet.routing import ExpertRouter

HEADER = ('layer', 'shares of the experts', 'top', 'entropy', 'variation')


@dataclass
class LayerUsage:
    """What the router of a layer did.

    An expert's share of an image is its weight over the sum of all weights,
    so that sigmoid and softmax are compared alike.

    Attributes:
        shares (list[float]): Mean share of each expert over the images.
        variation (float): Standard deviation of the shares over the images,
            mean over the experts; 0 where all images get the same kernel.
    """

    shares: list
    variation: float

    @property
    def top(self) -> float:
        """float: The largest share; ``1 / M`` where all are alike."""
        return max(self.shares)

    @property
    def entropy(self) -> float:
        """float: Of the shares: 1 where all are alike, 0 for a single one."""
        terms = (share * math.log(share) for share in self.shares if share)
        return -sum(terms) / math.log(len(self.shares))

    def row(self, name: str) -> tuple[str, ...]:
        """The cells of :data:`HEADER`."""
        return (
            name,
            ' '.join(f'{share:.2f}' for share in self.shares),
            f'{self.top:.2f}',
            f'{self.entropy:.2f}',
            f'{self.variation:.3f}',
        )


class ExpertUsage:
    """Watch the routers of a model inside the context.

    Args:
        model (nn.Module): Its :class:`ExpertRouter` are watched.

    Example:
        >>> with ExpertUsage(model) as usage:
        ...     model(images)
        >>> usage.result()['backbone.stem.conv'].top
        0.31
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = {
            name.removeprefix('module.').removesuffix('.routing'): module
            for name, module in model.named_modules()
            if isinstance(module, ExpertRouter)
        }
        self._sums: dict[str, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> 'ExpertUsage':
        for name, router in self.routers.items():
            self._handles.append(
                router.register_forward_hook(self._watch(name))
            )
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _watch(self, name):
        def hook(router, args, attention):
            shares = attention.detach().double()
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
            # Ones count the images.
            moments = torch.ones_like(shares), shares, shares.square()
            sums = torch.stack([moment.sum(0) for moment in moments])
            self._sums[name] = self._sums.get(name, 0) + sums

        return hook

    def result(self) -> dict[str, LayerUsage]:
        """What was seen so far, over all processes.

        Returns:
            dict[str, LayerUsage]: By the name of the layer; a layer that no
            image went through is not there.
        """
        result = {}
        for name, router in self.routers.items():
            weight = router.fc.weight
            sums = self._sums.get(name)
            if sums is None:
                sums = weight.new_zeros(3, len(weight), dtype=torch.float64)
            sums = sums.clone()
            all_reduce(sums)
            number = sums[0, 0].item()
            if number:
                mean, square = sums[1:] / number
                deviation = (square - mean.square()).clamp(min=0).sqrt()
                result[name] = LayerUsage(
                    mean.tolist(), deviation.mean().item()
                )
        return result


def usage_table(usage: dict[str, LayerUsage]) -> str:
    """A line of text for each layer.

    Args:
        usage (dict[str, LayerUsage]): See :meth:`ExpertUsage.result`.

    Returns:
        str: A table with a header.
    """
    rows = [HEADER, *(layer.row(name) for name, layer in usage.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths))
        for row in rows
    )


def collapsed_layers(
    usage: dict[str, LayerUsage], threshold: float = 0.9
) -> list[str]:
    """Layers where one expert does nearly everything.

    Args:
        usage (dict[str, LayerUsage]): See :meth:`ExpertUsage.result`.
        threshold (float): Share from which on an expert counts as the only
            one. Defaults to 0.9.

    Returns:
        list[str]: Their names.
    """
    return [name for name, layer in usage.items() if layer.top >= threshold]
