"""Size, time, memory and latency of the ways to adapt a model."""

import copy
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from bccd_measure import Subject
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, DefaultScope
from rep_adapter_runs import trained_parameters
from torch import nn

from lors_plugin.adapters import (
    adapter_checkpoint,
    adapters_of,
    inject_adapters,
)
from lors_plugin.checkpoints import save_checkpoint_file
from lors_plugin.registry import MODELS
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

logger = logging.getLogger('rep_adapter')
HOOKS_ONLY = ('type', 'adapter_only', 'base')


def build_model(cfg: Config) -> nn.Module:
    """Build a model as its hooks make it.

    Args:
        cfg (Config): A config of this page, adapters or not.

    Returns:
        nn.Module: Its weights are not initialised yet.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        data = cfg.get('data_preprocessor')
        extra = dict(data_preprocessor=data) if data else {}
        model = MODELS.build(dict(cfg.model, **extra))
    for hook in cfg.get('custom_hooks', []):
        options = {k: v for k, v in hook.items() if k not in HOOKS_ONLY}
        if hook.type == 'lors_plugin.RepAdapterHook':
            inject_adapters(model, **options)
        elif hook.type == 'lors_plugin.FreezeHook':
            for name in hook.modules:
                model.get_submodule(name).requires_grad_(False)
    return model


class AdapterSubject(Subject):
    """A model with its optimizer, ready for training iterations.

    Args:
        cfg (Config): Config of the model.
        batch (dict): ``inputs`` and ``data_samples``, not normalised.
        device (str): Where to run.
    """

    def __init__(self, cfg: Config, batch: dict, device: str) -> None:
        torch.manual_seed(0)
        self.model = build_model(cfg)
        self.model.init_weights()
        self.model.to(device).train()
        self.optim = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.batch = batch
        self.device = device

    def sizes(self) -> dict:
        """Count parameters, and bytes of an adapter file.

        Returns:
            dict: ``params``, ``trained``, ``trained_backbone`` and, where
            there are adapters, ``adapter_file``.
        """
        result = dict(
            params=sum(p.numel() for p in self.model.parameters()),
            trained=trained_parameters(self.model),
            trained_backbone=trained_parameters(self.model.backbone),
        )
        if adapters_of(self.model):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / 'adapter.pth'
                save_checkpoint_file(adapter_checkpoint(self.model), path)
                result['adapter_file'] = path.stat().st_size
        return result

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch, a scalar."""
        with self.optim.optim_context(self.model):
            return super().loss()

    def time(self, what: Callable[[], None]) -> float:
        """Time one call: processor time on a CPU, which others disturb less.

        Args:
            what (Callable): What to call.

        Returns:
            float: Seconds.
        """
        if self.device == 'cuda':
            return super().time(what)
        start = time.process_time()
        what()
        return time.process_time() - start


def load_batch(cfg: Config) -> dict:
    """Read the first images of the training set, without augmentation.

    Args:
        cfg (Config): Its test pipeline sets the size of the images.

    Returns:
        dict: ``inputs`` and ``data_samples``, as many as in a batch.
    """
    loader = cfg.train_dataloader
    pipeline = cfg.val_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(dict(loader.dataset, pipeline=pipeline))
        return pseudo_collate([dataset[i] for i in range(loader.batch_size)])


def prepare() -> str:
    """One thread as in the trainings, and silence.

    Returns:
        str: The device.
    """
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    torch.backends.cuda.enable_flash_sdp(False)
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def summary(values: list[float]) -> dict:
    """Median and quartiles.

    Args:
        values (list[float]): Seconds.

    Returns:
        dict: ``median`` and ``quartiles``.
    """
    low, middle, high = np.percentile(values, (25, 50, 75))
    return dict(median=middle, quartiles=[low, high])


def measure(
    configs: Mapping[str, Config], rounds: int, warmup: int = 2
) -> dict[str, dict]:
    """Measure the training of all models in turns.

    Args:
        configs (Mapping[str, Config]): Config of each model.
        rounds (int): Timed iterations of each model.
        warmup (int): Iterations before. Defaults to 2.

    Returns:
        dict[str, dict]: For each model sizes, seconds and bytes.
    """
    device = prepare()
    subjects = {
        name: AdapterSubject(cfg, load_batch(cfg), device)
        for name, cfg in configs.items()
    }
    times = {name: [] for name in subjects}
    for i in range(warmup + rounds):
        for name, subject in subjects.items():
            seconds = subject.time(subject.step)
            if i >= warmup:
                times[name].append(seconds)
    return {
        name: dict(
            subject.sizes(),
            train_seconds=summary(times[name]),
            memory=subject.memory(),
        )
        for name, subject in subjects.items()
    }


def measure_latency(
    plain: Config, adapted: Config, size: int, batches: list[int], rounds: int
) -> dict:
    """Measure plain, adapted and merged model in turns, in float32.

    Args:
        plain (Config): Config of the model without adapters.
        adapted (Config): The same with adapters.
        size (int): Sides of the images.
        batches (list[int]): Images at a time.
        rounds (int): Timed calls of each.

    Returns:
        dict: Seconds by model and batch, largest ``difference`` of the
        merged outputs relative to the largest output.
    """
    device = prepare()
    models = dict(plain=build_model(plain), adapted=build_model(adapted))
    for model in models.values():
        model.init_weights()
    # Fresh adapters do nothing: these shall change the outputs.
    for adapter in adapters_of(models['adapted']).values():
        randomize(adapter, 0)
    models['merged'] = copy.deepcopy(models['adapted']).eval()
    reparameterize(models['merged'])
    for model in models.values():
        model.to(device).eval()
    seconds = {name: {batch: [] for batch in batches} for name in models}
    outputs = {}
    with torch.no_grad():
        for batch in batches:
            images = torch.randn(batch, 3, size, size, device=device)
            for i in range(rounds + 2):
                for name, model in models.items():
                    start = time.perf_counter()
                    outputs[name] = model(images, mode='tensor')
                    if device == 'cuda':
                        torch.cuda.synchronize()
                    if i >= 2:
                        spent = time.perf_counter() - start
                        seconds[name][batch].append(spent)
    gap = (outputs['merged'] - outputs['adapted']).abs().max()
    largest = outputs['adapted'].abs().max()
    moved = (outputs['adapted'] - outputs['plain']).abs().max()
    return dict(
        size=size,
        threads=torch.get_num_threads(),
        seconds={
            name: {str(b): summary(v) for b, v in values.items()}
            for name, values in seconds.items()
        },
        difference=float(gap / largest),
        moved=float(moved / largest),
    )
