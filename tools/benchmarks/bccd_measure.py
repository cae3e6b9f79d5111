"""Size, time and memory of the models of the BCCD benchmark."""

import logging
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

import lors_plugin  # noqa: F401  (makes mmcv.ops importable)

logger = logging.getLogger('bccd')


def count(module: nn.Module) -> int:
    """Count parameters.

    Args:
        module (nn.Module): The module.

    Returns:
        int: Numbers in its parameters.
    """
    return sum(param.numel() for param in module.parameters())


class Subject:
    """A model with its optimizer, ready for training iterations.

    Args:
        config (Config): Config of the model.
        batch (dict): ``inputs`` and ``data_samples``, not normalised.
        device (str): Where to run.
    """

    def __init__(self, config: Config, batch: dict, device: str) -> None:
        from mmdet.registry import MODELS

        torch.manual_seed(0)
        self.model = MODELS.build(config.model).to(device).train()
        self.optim = build_optim_wrapper(self.model, config.optim_wrapper)
        self.batch = batch
        self.device = device

    def sizes(self) -> dict:
        """Count parameters.

        Returns:
            dict: ``params``, ``decoder_params`` and ``mixing_params``.
        """
        decoder = self.model.decoder
        return dict(
            params=count(self.model),
            decoder_params=count(decoder),
            mixing_params=count(decoder.mixing),
        )

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch, a scalar."""
        data = self.model.data_preprocessor(self.batch, training=True)
        return self.model.parse_losses(self.model(**data, mode='loss'))[0]

    def step(self) -> None:
        """One training iteration: forward, backward, optimizer."""
        self.optim.update_params(self.loss())

    def predict(self) -> None:
        """Detect the objects of the batch."""
        self.model.eval()
        with torch.no_grad():
            self.model.test_step(self.batch)
        self.model.train()

    def time(self, what: Callable[[], None]) -> float:
        """Time one call.

        Args:
            what (Callable): What to call.

        Returns:
            float: Seconds.
        """
        wait = torch.cuda.synchronize if self.device == 'cuda' else int
        wait()
        start = time.perf_counter()
        what()
        wait()
        return time.perf_counter() - start

    def memory(self) -> dict:
        """Measure the memory of training.

        Returns:
            dict: Bytes: ``state`` of parameters and optimizer between two
            steps, which clear gradients, and ``saved`` of the tensors that
            forward keeps for backward.
        """
        self.step()
        state = 0
        for param in self.model.parameters():
            kept = [param]
            kept += self.optim.optimizer.state.get(param, {}).values()
            state += sum(
                t.numel() * t.element_size()
                for t in kept
                if torch.is_tensor(t)
            )
        self.optim.zero_grad()
        own = {p.untyped_storage().data_ptr() for p in self.all_tensors()}
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        # The graph must live until the end: a storage that is freed early
        # would give its address to another one.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        result = dict(state=state, saved=sum(saved.values()))
        del loss
        return result

    def all_tensors(self) -> list[torch.Tensor]:
        """Return parameters and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]


def load_batch(config: Config) -> dict:
    """Read the first images of the training set, without augmentation.

    Args:
        config (Config): Its test pipeline sets the size of the images.

    Returns:
        dict: ``inputs`` and ``data_samples``, as many as in a batch.
    """
    from mmdet.registry import DATASETS

    loader = config.train_dataloader
    dataset = dict(
        loader.dataset, pipeline=config.val_dataloader.dataset.pipeline
    )
    dataset = DATASETS.build(dataset)
    return pseudo_collate([dataset[i] for i in range(loader.batch_size)])


def measure(
    configs: Mapping[str, Config], rounds: int, warmup: int = 2
) -> dict[str, dict]:
    """Measure all models in turns, one iteration of each a round.

    What else happens on the machine then meets all models alike.

    Args:
        configs (Mapping[str, Config]): Config of each model.
        rounds (int): Timed iterations of each model; 0 for none.
        warmup (int): Iterations before. Defaults to 2.

    Returns:
        dict[str, dict]: For each model sizes, seconds and bytes.
    """
    init_default_scope('mmdet')
    # Not a word on each frozen parameter.
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    # As the trainings: threads that wait for each other measure the machine.
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    logger.info(
        'time of an iteration: %d rounds, %d threads, %s',
        rounds,
        torch.get_num_threads(),
        device,
    )
    subjects = {
        name: Subject(config, load_batch(config), device)
        for name, config in configs.items()
    }
    times = {name: dict(train=[], predict=[]) for name in subjects}
    for i in range(warmup + rounds if rounds else 0):
        for name, subject in subjects.items():
            for kind, call in (
                ('train', subject.step),
                ('predict', subject.predict),
            ):
                seconds = subject.time(call)
                if i >= warmup:
                    times[name][kind].append(seconds)
    results = {}
    for name, subject in subjects.items():
        results[name] = subject.sizes()
        for kind, values in times[name].items():
            if not values:
                continue
            low, middle, high = np.percentile(values, (25, 50, 75))
            results[name][f'{kind}_seconds'] = dict(
                median=middle, quartiles=[low, high]
            )
        results[name]['memory'] = subject.memory()
    return results
