"""Hooks that configs of tests name, also in processes of their own."""

import os
import signal
import time

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class NoticeHook(Hook):
    """Give a notice to stop to the launcher of two processes, once."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and not runner._resume:
            os.kill(int(os.environ['PARENT']), signal.SIGUSR1)
            time.sleep(1)


@HOOKS.register_module()
class StopHook(Hook):
    """Give a notice to stop to this process in the middle, once."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 5 and not runner._resume:
            signal.raise_signal(signal.SIGTERM)


@HOOKS.register_module()
class SaveRankHook(Hook):
    """Save what a rank holds at the end; MMEngine saves that of rank 0."""

    def after_train(self, runner):
        model = runner.model
        if is_model_wrapper(model):
            assert not model.find_unused_parameters
            model = model.module
        path = f'{runner.work_dir}/rank{get_rank()}.pth'
        torch.save(model.state_dict(), path)
