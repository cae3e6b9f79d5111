"""Parts of a model that stay as they were loaded."""

from collections.abc import Sequence
from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class FreezeHook(Hook):
    """Freeze parts of a model: a linear probe of any backbone, for example.

    What ``frozen_stages`` of a backbone leaves out (its last norm or
    convolution) is frozen too. The parts are kept in evaluation mode, so that
    running statistics stay and nothing is dropped.

    Args:
        modules (Sequence[str]): Names of the parts. Defaults to
            ('backbone', ).
    """

    # Before the hooks that copy the model (EMA) and the profilers.
    priority = 'VERY_HIGH'

    def __init__(self, modules: Sequence[str] = ('backbone',)) -> None:
        self.modules = [modules] if isinstance(modules, str) else [*modules]
        self._frozen: list = []

    def before_run(self, runner: Runner) -> None:
        """Freeze, and wrap the model anew, as wrappers count gradients."""
        wrapped = is_model_wrapper(runner.model)
        model = runner.model.module if wrapped else runner.model
        self._frozen = []
        for name in self.modules:
            try:
                part = model.get_submodule(name)
            except AttributeError:
                parts = [child for child, _ in model.named_children()]
                raise ValueError(
                    f'FreezeHook: {type(model).__name__} has no part '
                    f'{name!r}; there are {parts}'
                ) from None
            part.requires_grad_(False)
            self._frozen.append(part)
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError(f'FreezeHook: {self.modules} leaves nothing')
        if wrapped:
            # The old wrapper takes its gradient hooks with it.
            runner.model = model
            wrapper_cfg = runner.cfg.get('model_wrapper_cfg')
            runner.model = runner.wrap_model(wrapper_cfg, model)

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
    ) -> None:
        """Keep the frozen parts in evaluation mode."""
        for part in self._frozen:
            if part.training:
                part.eval()
