"""Shared stacks by three lines of a config."""

from copy import deepcopy
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from lors_plugin.lors import LowRankResidualLinear, share_stack
from lors_plugin.registry import HOOKS

from .remake import is_training, rebuild_optimizer, wrap_again


@HOOKS.register_module()
class LORSHook(Hook):
    """Let stacks of a model share weights before it trains or is tested.

    For parts that no config entry builds, such as the layers of DETR's
    decoder; where one does, ``lors_plugin.LORSStack`` is simpler, since the
    model then has its structure wherever it is built. The optimizer, its
    schedules and the distributed wrapper are made anew from the config.

    Args:
        **options: Of :func:`lors_plugin.lors.share_stack`.
    """

    # Before the hooks that copy the model (EMA) and the profilers.
    priority = 'VERY_HIGH'

    def __init__(self, **options: Any) -> None:
        self.options = options

    def preview(self, model: nn.Module) -> nn.Module:
        """A copy of a model as it will be, to check files against."""
        if _has_stacks(model):
            return model
        model = deepcopy(model)
        share_stack(model, **self.options)
        return model

    def before_run(self, runner: Runner) -> None:
        """Change the model; in training, remake what depends on it."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        if _has_stacks(model):
            # A second run (train, then test) of the same runner.
            runner.logger.info('LORS: the model has shared stacks already')
            return
        report = share_stack(model, **self.options)
        runner.logger.info(f'LORS\n{report.table()}')
        wrap_again(runner, model)
        if is_training(runner):
            rebuild_optimizer(runner, 'lors_plugin.lors.share_stack(model)')


def _has_stacks(model: nn.Module) -> bool:
    return any(isinstance(m, LowRankResidualLinear) for m in model.modules())
