"""Check the Triton kernels before a run, and agree with all ranks."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from lors_plugin.ops import self_check
from lors_plugin.ops.backend import device_verdict
from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class KernelCheckHook(Hook):
    """A runner hook that decides which Triton kernels ``'auto'`` takes.

    On a GPU that the package has not met with these versions, the kernels
    are checked before the first iteration, which takes some minutes once, see
    :mod:`lors_plugin.ops.self_check`. All ranks then take the kernels that
    each of them would. It does nothing on CPUs, and for models without an
    operator that has kernels. Whatever goes wrong, the run goes on with the
    PyTorch operators.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Check, agree, and say what was decided."""
        device = device_of(runner.model)
        if device.type != 'cuda' or not uses_kernels(runner.model):
            return
        if self_check.is_off():
            reason = f'{self_check.ENV_NAME}=off'
        else:
            reason = self.check(runner, device)
        taken = self_check.agree(device.index)
        if taken:
            text = f'Triton kernels run for {", ".join(sorted(taken))}'
        else:
            text = 'The PyTorch operators run, no Triton kernels'
        runner.logger.info(f'{text}{reason and f": {reason}"}')

    def check(self, runner: Runner, device: torch.device) -> str:
        """Check the kernels of a GPU unless they are known.

        Returns:
            str: Why that was not possible, '' if it was.
        """
        index = device.index
        possible, reason = device_verdict('cuda', index, torch.float32)
        if not possible:
            return reason
        try:
            self_check.check(
                self_check.find_card(index),
                str(device),
                say=runner.logger.info,
            )
        except self_check.SelfCheckError as error:
            return str(error)
        self_check.forget()
        return ''


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model, the CPU if it has no parameters."""
    for parameter in model.parameters():
        return parameter.device
    return torch.device('cpu')


def uses_kernels(model: nn.Module) -> bool:
    """Return whether a model leaves the choice of kernels to ``'auto'``."""
    return any(
        getattr(module, 'backend', None) == 'auto'
        for module in model.modules()
    )
