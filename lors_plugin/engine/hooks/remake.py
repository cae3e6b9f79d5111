"""What a runner made for its model, made anew once a hook changed that."""

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def is_training(runner: Runner) -> bool:
    """Whether ``train()`` runs: it builds the optimizer before any hook."""
    return runner.optim_wrapper is not None and not isinstance(
        runner.optim_wrapper, dict
    )


def wrap_again(runner: Runner, model: nn.Module) -> None:
    """Wrap a model whose parameters or their gradients changed.

    Args:
        runner (Runner): Its model is ``model``, wrapped or not.
        model (nn.Module): Without wrapper.
    """
    if is_model_wrapper(runner.model):
        wrapper_cfg = runner.cfg.get('model_wrapper_cfg')
        # The old wrapper takes its gradient hooks with it.
        runner.model = model
        runner.model = runner.wrap_model(wrapper_cfg, model)


def rebuild_optimizer(runner: Runner, instead: str) -> None:
    """Build optimizer and schedules for new parameters.

    Args:
        runner (Runner): In training.
        instead (str): What to do where there is no config, for the error.
    """
    optim_cfg = runner.cfg.get('optim_wrapper')
    if not isinstance(optim_cfg, dict):
        raise TypeError(
            'the optimizer must be built for the new weights, but this '
            f'runner was not made from a config; call {instead} before '
            'making it'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(optim_cfg)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(
            runner.cfg.param_scheduler
        )
