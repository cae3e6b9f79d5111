"""Notice when the routing of dynamic layers collapses to one expert."""

from typing import Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from lors_plugin.analysis import ExpertUsage, collapsed_layers, usage_table
from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class ExpertUsageHook(Hook):
    """Watch which experts validation and test images use.

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
        """Say so if there is nothing to watch."""
        if not ExpertUsage(runner.model).routers:
            runner.logger.warning(
                'ExpertUsageHook: the model has no layer with experts'
            )

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin to watch."""
        self._usage = ExpertUsage(runner.model).__enter__()

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[dict] = None
    ) -> None:
        """Report what was seen."""
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
