"""Random numbers of an epoch follow from the seed, the epoch and the rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lors_plugin.engine.hooks import EpochSeedHook


class Noise(Dataset):
    """Random numbers, as an augmentation would draw them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.random.rand(), torch.rand(1).item()


class Sampler(torch.utils.data.SequentialSampler):
    seed = None


def seen(values):
    return [tuple(round(v.item(), 9) for v in row) for row in values]


def run(seed, epochs, workers=1, configured=None, diff_rank_seed=False):
    """What the epochs see, with workers that persist."""
    data = Noise()
    loader = DataLoader(
        data,
        num_workers=workers,
        persistent_workers=workers > 0,
        sampler=Sampler(data),
        worker_init_fn=configured,
    )
    runner = SimpleNamespace(
        train_dataloader=loader,
        seed=seed,
        epoch=0,
        _randomness_cfg=dict(diff_rank_seed=diff_rank_seed),
    )
    hook = EpochSeedHook()
    hook.before_train(runner)
    assert loader.sampler.seed == seed
    results = []
    for runner.epoch in epochs:
        hook.before_train_epoch(runner)
        results.append(seen(loader))
    return results


@pytest.mark.parametrize('workers', [0, 1])
def test_an_epoch_is_the_same_wherever_one_starts(workers):
    whole = run(5, [0, 1, 2], workers)
    assert run(5, [2], workers)[0] == whole[2]
    assert whole[0] != whole[1]
    assert run(6, [0], workers)[0] != whole[0]


def test_what_was_configured_for_workers_still_runs(tmp_path):
    def configured(worker):
        (tmp_path / f'worker{worker}').touch()

    assert run(5, [0], configured=configured) == run(5, [0])
    assert (tmp_path / 'worker0').exists()


def test_ranks_share_the_seed_of_the_sampler(monkeypatch):
    """MMEngine adds the rank to the seed where ranks are to differ."""
    from lors_plugin.engine.hooks import epoch_seed_hook

    monkeypatch.setattr(epoch_seed_hook, 'get_rank', lambda: 3)
    runner = SimpleNamespace(seed=8, _randomness_cfg=dict(diff_rank_seed=True))
    assert epoch_seed_hook._base_seed(runner) == 5
    runner._randomness_cfg = {}
    assert epoch_seed_hook._base_seed(runner) == 8
