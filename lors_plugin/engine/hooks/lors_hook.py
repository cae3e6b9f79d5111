"""Shared stacks by three lines of a config."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from lors_plugin.lors import LowRankResidualLinear, share_stack
from lors_plugin.registry import HOOKS


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

    def before_run(self, runner: Runner) -> None:
        """Change the model; in training, remake what depends on it."""
        wrapped = is_model_wrapper(runner.model)
        model = runner.model.module if wrapped else runner.model
        if _has_stacks(model):
            # A second run (train, then test) of the same runner.
            runner.logger.info('LORS: the model has shared stacks already')
            return
        report = share_stack(model, **self.options)
        runner.logger.info(f'LORS\n{report.table()}')
        if wrapped:
            wrapper_cfg = runner.cfg.get('model_wrapper_cfg')
            # The old wrapper takes its gradient hooks with it.
            runner.model = model
            runner.model = runner.wrap_model(wrapper_cfg, model)
        optim_wrapper = runner.optim_wrapper
        if optim_wrapper is not None and not isinstance(optim_wrapper, dict):
            _rebuild_optimizer(runner)


def _has_stacks(model: nn.Module) -> bool:
    return any(isinstance(m, LowRankResidualLinear) for m in model.modules())


def _rebuild_optimizer(runner: Runner) -> None:
    """Train builds the optimizer before any hook, for the old weights."""
    optim_cfg = runner.cfg.get('optim_wrapper')
    if not isinstance(optim_cfg, dict):
        raise TypeError(
            'LORSHook must build the optimizer for the new weights, but this '
            'runner was not made from a config; call '
            'lors_plugin.lors.share_stack(model) before making it'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(optim_cfg)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(
            runner.cfg.param_scheduler
        )
