"""Record which experts dynamic layers use: a recorder and a runner hook.

Shapes: ``B`` images, ``M`` experts.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Optional

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from lors_plugin.registry import HOOKS
from lors_plugin.utils import text_table

from .routing import ExpertRouter

HEADER = ('layer', 'shares of the experts', 'top', 'entropy', 'variation')


@dataclass
class LayerUsage:
    """Statistics of the routing of a layer.

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
    """Record the routing of a model inside the context.

    Args:
        model (nn.Module): Its :class:`ExpertRouter` are recorded.

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
                router.register_forward_hook(self._recorder(name))
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

    def _recorder(self, name):
        def hook(router, args, attention):
            shares = attention.detach().double()
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
            # Ones count the images.
            moments = torch.ones_like(shares), shares, shares.square()
            sums = torch.stack([moment.sum(0) for moment in moments])
            self._sums[name] = self._sums.get(name, 0) + sums

        return hook

    def result(self) -> dict[str, LayerUsage]:
        """Statistics so far, over all processes.

        Returns:
            dict[str, LayerUsage]: By the name of the layer; a layer that no
            image went through is not there.
        """
        result = {}
        for name, router in self.routers.items():
            sums = self._sums.get(name)
            if sums is None:
                # Of a quantised layer the parameters are packed.
                like = next(router.parameters(), torch.empty(0))
                sums = like.new_zeros(
                    3, router.fc.out_features, dtype=torch.float64
                )
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
    """Format the usage as text, one line per layer.

    Args:
        usage (dict[str, LayerUsage]): See :meth:`ExpertUsage.result`.

    Returns:
        str: A table with a header.
    """
    rows = [HEADER, *(layer.row(name) for name, layer in usage.items())]
    return text_table(rows)


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


@HOOKS.register_module()
class ExpertUsageHook(Hook):
    """A runner hook that records the experts of validation and test images.

    Logs a table with a line for each dynamic layer after each validation:
    the share of every expert, the largest, the entropy (1 where all experts
    are used alike, 0 where a single one is left) and how much the shares
    vary from image to image. Warns of layers that are left with one expert:
    they compute what a plain layer does, at ``M`` times the parameters. The
    means over all layers go to the loggers as ``expert_usage/top``,
    ``entropy`` and ``variation``.

    Args:
        threshold (float): Share from which on an expert counts as the only
            one. Defaults to 0.9.
        show_table (bool): Whether to log all layers. Defaults to True.
    """

    priority = 'LOW'

    def __init__(
        self, threshold: float = 0.9, show_table: bool = True
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(
                f'threshold={threshold} must be a share above 0, up to 1'
            )
        self.threshold = threshold
        self.show_table = show_table
        self._usage: Optional[ExpertUsage] = None

    def before_run(self, runner: Runner) -> None:
        """Warn if there is nothing to record."""
        if not ExpertUsage(runner.model).routers:
            runner.logger.warning(
                'ExpertUsageHook: the model has no layer with experts'
            )

    def before_val_epoch(self, runner: Runner) -> None:
        """Start recording."""
        self._usage = ExpertUsage(runner.model).__enter__()

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[dict] = None
    ) -> None:
        """Report the statistics."""
        usage, self._usage = self._usage, None
        usage.__exit__(None, None, None)
        layers = usage.result()
        if not layers or not is_main_process():
            return
        if self.show_table:
            runner.logger.info('Experts in use:\n%s', usage_table(layers))
        for name in ('top', 'entropy', 'variation'):
            mean = sum(getattr(x, name) for x in layers.values()) / len(layers)
            runner.visualizer.add_scalar(
                f'expert_usage/{name}', mean, runner.iter
            )
        collapsed = collapsed_layers(layers, self.threshold)
        if collapsed:
            runner.logger.warning(
                '%d of %d dynamic layers use a single expert for %.0f %% or '
                'more: %s. They do what plain layers do. A higher '
                'temperature of the routing, a lower learning rate of the '
                "routers or routing='sigmoid_linear' may help",
                len(collapsed),
                len(layers),
                100 * self.threshold,
                ', '.join(collapsed),
            )

    before_test_epoch = before_val_epoch
    after_test_epoch = after_val_epoch
