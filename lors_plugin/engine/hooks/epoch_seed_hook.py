"""A resumed training sees what an uninterrupted one would have seen."""

import random
from collections.abc import Callable
from functools import partial
from typing import Optional

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from lors_plugin.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed everything anew at the start of every epoch.

    MMEngine restores weights, optimizer and schedules, but neither the
    order of the images, where no seed was configured, nor the state of
    random numbers, on which augmentations and drop path depend. And it
    gives the workers of every epoch the same seed, unless they persist. With
    this hook, all of that follows from the seed of the run, which is kept in
    checkpoints, the epoch and the rank. Workers start anew each epoch.

    Loops over iterations have no epochs and are seeded once, at the start.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Let the sampler follow the seed of the run, also a resumed one."""
        loader = runner.train_dataloader
        for owner in (loader, loader.batch_sampler):
            sampler = getattr(owner, 'sampler', None)
            if hasattr(sampler, 'seed'):
                sampler.seed = _base_seed(runner)
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed this process, and with it the workers that it will start."""
        seed = _base_seed(runner) + runner.epoch * get_world_size()
        _seed_process(seed + get_rank())
        _restart_workers(runner.train_dataloader)


def _base_seed(runner: Runner) -> int:
    """The seed that all ranks share."""
    different = runner._randomness_cfg.get('diff_rank_seed', False)
    return runner.seed - get_rank() * different


def _seed_process(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _init_worker(configured: Optional[Callable], worker: int) -> None:
    """Do what was configured, then seed by worker and epoch.

    The loader draws a new base seed for its workers every epoch, from the
    random numbers of the process that were seeded for that epoch.
    """
    seed = torch.initial_seed()
    if configured is not None:
        configured(worker)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _restart_workers(loader: DataLoader) -> None:
    # Persistent workers keep the random state of earlier epochs, which a
    # resumed run does not have; the loader starts new ones without this.
    if getattr(loader, 'persistent_workers', False):
        loader._iterator = None
