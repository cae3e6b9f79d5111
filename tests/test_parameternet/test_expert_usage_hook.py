"""A collapsed router is reported, a healthy one is not."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lors_plugin.engine.hooks import ExpertUsageHook
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.registry import HOOKS


@pytest.fixture
def runner():
    scalars = {}
    visualizer = SimpleNamespace(
        add_scalar=lambda name, value, step: scalars.update({name: value})
    )
    return SimpleNamespace(
        model=nn.ModuleDict(
            dict(a=DynamicConv2d(3, 3, 1), b=DynamicConv2d(3, 3, 1))
        ),
        logger=logging.getLogger('expert usage'),
        visualizer=visualizer,
        scalars=scalars,
        iter=7,
    )


def validate(hook, runner):
    hook.before_run(runner)
    hook.before_val_epoch(runner)
    for layer in runner.model.values():
        layer(torch.randn(4, 3, 5, 5))
    hook.after_val_epoch(runner, {})


def warnings(caplog):
    return [r.message for r in caplog.records if r.levelname == 'WARNING']


@pytest.mark.parametrize('collapsed', [False, True])
def test_collapse_is_reported(collapsed, runner, caplog):
    caplog.set_level(logging.INFO)
    hook = HOOKS.build(dict(type='lors_plugin.ExpertUsageHook'))
    if collapsed:
        with torch.no_grad():
            runner.model['b'].routing.fc.bias[2] = 20
    validate(hook, runner)
    assert 'shares of the experts' in caplog.text
    found = warnings(caplog)
    assert len(found) == collapsed
    if collapsed:
        assert '1 of 2 dynamic layers' in found[0]
        assert ': b. ' in found[0]
    top = runner.scalars['expert_usage/top']
    assert top == pytest.approx(0.625 if collapsed else 0.25, abs=0.02)
    # Every validation is counted for itself.
    caplog.clear()
    with torch.no_grad():
        runner.model['b'].routing.fc.bias.zero_()
    validate(hook, runner)
    assert warnings(caplog) == []


def test_a_model_without_experts(runner, caplog):
    runner.model = nn.ModuleDict(dict(a=nn.Conv2d(3, 3, 1)))
    hook = ExpertUsageHook()
    validate(hook, runner)
    assert 'no layer with experts' in warnings(caplog)[0]
    assert runner.scalars == {}


def test_threshold():
    with pytest.raises(ValueError, match='threshold=1.5'):
        ExpertUsageHook(threshold=1.5)
