"""Keep parts of a model as they were loaded."""

from collections.abc import Sequence
from typing import Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner

from lors_plugin.registry import HOOKS
from lors_plugin.structure import rewrap
from lors_plugin.utils import part_of, unwrapped


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
        model = unwrapped(runner.model)
        self._frozen = [part_of(model, name) for name in self.modules]
        for part in self._frozen:
            part.requires_grad_(False)
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError(f'FreezeHook: {self.modules} leaves nothing')
        rewrap(runner)

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
