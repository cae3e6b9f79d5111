"""Adapters by four lines of a config."""

from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from lors_plugin.adapters import adapters_of, inject_adapters
from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class RepAdapterHook(Hook):
    """Adapt a part of the model before it trains or is tested.

    RepAdapter, section 3.3. The model gets its adapters before its weights
    are initialised or loaded; keys of the base weights stay, so
    ``load_from`` and ``init_cfg`` take any pretrained file, and files of an
    adapted model are resumed and tested with the same config. The optimizer,
    its schedules and the distributed wrapper are made anew from the config,
    since they were made for the model without adapters.

    After the first step it is an error if an adapter got no gradient: the
    layer that it adapts is then never reached.

    Args:
        **options: Of :func:`lors_plugin.adapters.inject_adapters`.
    """

    # Before the hooks that copy the model (EMA) and the profilers.
    priority = 'VERY_HIGH'

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._waiting: set = set()
        self._handles: list = []

    def before_run(self, runner: Runner) -> None:
        """Adapt the model; in training, remake what depends on it."""
        model = _unwrapped(runner.model)
        if adapters_of(model):
            # A second run (train, then test) of the same runner, or adapters
            # that somebody injected before.
            runner.logger.info('RepAdapter: the model has adapters already')
            return
        report = inject_adapters(model, **self.options)
        runner.logger.info(f'RepAdapter\n{report.table()}')
        if is_model_wrapper(runner.model):
            wrapper_cfg = runner.cfg.get('model_wrapper_cfg')
            # The old wrapper takes its gradient hooks with it.
            runner.model = model
            runner.model = runner.wrap_model(wrapper_cfg, model)
        if _is_training(runner):
            _rebuild_optimizer(runner)

    def before_train(self, runner: Runner) -> None:
        """Watch for the first gradient of every adapter."""
        self._waiting = set()
        for name, adapter in adapters_of(_unwrapped(runner.model)).items():
            if not adapter.up_bias.requires_grad:
                continue
            self._waiting.add(name)
            self._handles.append(
                adapter.up_bias.register_hook(
                    lambda _, name=name: self._waiting.discard(name)
                )
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Say which adapters are never reached, after the first step."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._waiting:
            names = sorted(self._waiting)
            raise RuntimeError(
                f'{len(names)} adapters got no gradient in the first step, '
                f'{names[0]} among them: its layer is never called, lies '
                'behind the outputs that are used, or a frozen part between '
                'it and the loss stops gradients. Exclude it or give other '
                'targets'
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _is_training(runner: Runner) -> bool:
    """Whether ``train()`` runs: it builds the optimizer before any hook."""
    return runner.optim_wrapper is not None and not isinstance(
        runner.optim_wrapper, dict
    )


def _rebuild_optimizer(runner: Runner) -> None:
    optim_cfg = runner.cfg.get('optim_wrapper')
    if not isinstance(optim_cfg, dict):
        raise TypeError(
            'RepAdapterHook must build the optimizer for the new weights, '
            'but this runner was not made from a config; call '
            'lors_plugin.adapters.inject_adapters(model) before making it'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(optim_cfg)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(
            runner.cfg.param_scheduler
        )
