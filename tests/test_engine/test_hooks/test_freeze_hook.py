"""Frozen parts of a model."""

from types import SimpleNamespace

import pytest
from torch import nn

from lors_plugin.engine.hooks import FreezeHook


@pytest.fixture
def runner():
    model = nn.ModuleDict(
        dict(
            backbone=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            head=nn.Linear(4, 2),
        )
    )
    return SimpleNamespace(model=model.train())


def test_freezes_and_keeps_statistics(runner):
    hook = FreezeHook('backbone')
    hook.before_run(runner)
    trained = {
        k for k, p in runner.model.named_parameters() if p.requires_grad
    }
    assert trained == {'head.weight', 'head.bias'}
    runner.model.train()  # as loops do at the start of every epoch
    hook.before_train_iter(runner, 0)
    assert not runner.model['backbone'][1].training
    assert runner.model['head'].training


def test_refuses_unknown_parts_and_nothing_left(runner):
    with pytest.raises(ValueError, match='no part .neck.; there are'):
        FreezeHook(['neck']).before_run(runner)
    with pytest.raises(ValueError, match='leaves nothing'):
        FreezeHook(['backbone', 'head']).before_run(runner)
