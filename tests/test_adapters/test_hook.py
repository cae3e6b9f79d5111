"""Adapters by config: what real runners make of them."""

import copy
from functools import partial

import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.adapters import adapters_of, inject_adapters
from lors_plugin.structure import rewrap


def weights(model, adapted):
    keys = [k for k in model.state_dict() if ('rep_adapter' in k) == adapted]
    return {k: model.state_dict()[k].clone() for k in keys}


def test_trains_adapters_and_head_only(tiny, tmp_path):
    runner = tiny.make(tmp_path)
    model = runner.train()
    assert list(adapters_of(model)) == ['backbone.0.used', 'backbone.1.used']
    in_optimizer = {
        id(p)
        for group in runner.optim_wrapper.param_groups
        for p in group['params']
    }
    changed = weights(model, True)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert id(param) in in_optimizer, name
            if 'rep_adapter.up' in name:
                assert changed[name].abs().max() > 0, name
    assert runner.optim_wrapper.get_lr()['lr'][0] == pytest.approx(0.05)


def test_base_weights_stay_as_initialised(tiny, tmp_path):
    shorter = tiny.make(tmp_path, 'shorter', epochs=1).train()
    longer = tiny.make(tmp_path, 'longer').train()
    fresh = weights(shorter, False)
    kept = weights(longer, False)
    assert kept.keys() == tiny.Model().state_dict().keys()
    for key in kept:
        same = torch.equal(kept[key], fresh[key])
        assert same == key.startswith('backbone'), key


def test_resumes_and_averages(tiny, tmp_path):
    ema = dict(type='EMAHook', momentum=0.5)
    whole = tiny.make(tmp_path, 'whole', hooks=[copy.copy(ema)]).train()
    tiny.make(tmp_path, 'half', epochs=1, hooks=[copy.copy(ema)]).train()
    runner = tiny.make(
        tmp_path,
        'resumed',
        hooks=[copy.copy(ema)],
        load_from=str(tmp_path / 'half/epoch_1.pth'),
        resume=True,
    )
    resumed = runner.train()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value)
    saved = torch.load(tmp_path / 'resumed/epoch_2.pth', weights_only=False)
    key = 'backbone.0.used.rep_adapter.up_weight'
    assert not torch.equal(
        saved['state_dict'][key], saved['ema_state_dict']['module.' + key]
    )


def test_a_layer_that_is_never_called(tiny, tmp_path):
    runner = tiny.make(tmp_path, adapt=dict(targets=[r'\d\.(used|unused)']))
    with pytest.raises(
        RuntimeError, match=r'2 adapters got no gradient.*backbone.0.unused'
    ):
        runner.train()


def test_where_it_can_be_told_it_is_an_error_before_anything(tiny, tmp_path):
    adapt = dict(targets=[r'\d\.(used|unused)'])
    runner = tiny.make(tmp_path, adapt=adapt, model=dict(images=True))
    with pytest.raises(ValueError, match='2 of the .*: backbone.1.unused, '):
        runner.train()
    assert runner.train_loop.iter == 0
    tiny.make(tmp_path, 'good', model=dict(images=True)).train()


def test_without_a_config_the_way_out_is_named(tiny, tmp_path):
    runner = tiny.make(tmp_path)
    runner.cfg.pop('optim_wrapper')
    with pytest.raises(TypeError, match='inject_adapters'):
        runner.train()


def test_recomputing_behind_frozen_layers(tiny, tmp_path):
    """MMEngine's way gives no gradients where no input requires one."""
    plain = tiny.make(tmp_path, 'plain', epochs=1).train()
    again = tiny.make(
        tmp_path,
        'recomputed',
        epochs=1,
        cfg=dict(activation_checkpointing='backbone'),
    ).train()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)


def test_frozen_adapters(tiny, tmp_path):
    hooks = [dict(type='lors_plugin.FreezeHook', modules=['backbone.1'])]
    runner = tiny.make(tmp_path, hooks=hooks)
    with pytest.raises(
        RuntimeError, match='backbone.1.used is frozen.*Freeze'
    ):
        runner.train()


def test_recomputing_by_the_host(tiny, tmp_path):
    """``with_cp`` is the reentrant form in older versions of PyTorch."""
    plain = tiny.make(tmp_path, 'plain', epochs=1).train()
    runner = tiny.make(tmp_path, 'recomputed', epochs=1)
    for block in runner.model.backbone:
        block.with_cp = True
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    again = runner.train()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)


def test_described_adapters_are_watched(tiny, tmp_path):
    """As those of a hook; their norms keep the statistics of the base."""
    runner = tiny.make(tmp_path, model=dict(norm=True), adapt=dict(scale=9.0))
    inject_adapters(runner.model, targets=[r'0\.used'], hidden_dims=2)
    optimizer = dict(runner.optim_wrapper)
    model = runner.train()
    assert list(adapters_of(model)) == ['backbone.0.used']
    assert adapters_of(model)['backbone.0.used'].options()['hidden_dims'] == 2
    norm = model.backbone[0].norm
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert not norm.training
    assert model.backbone[0].used.rep_adapter.up_weight.abs().max() > 0
    assert optimizer['optimizer']['type'] == 'SGD'


def test_train_then_test_of_one_runner(tiny, tmp_path):
    """The second ``before_run`` finds the adapters and keeps them."""
    runner = tiny.make(
        tmp_path,
        test_dataloader=dict(dataset=tiny.Numbers(), **tiny.LOADER),
        test_cfg=dict(),
        test_evaluator=[tiny.Distance()],
    )
    trained = {k: v.clone() for k, v in runner.train().state_dict().items()}
    assert runner.test()['distance'] > 0
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, trained[key]), key


class Sharded(nn.Module):
    """A wrapper that a model cannot be taken out of, like FSDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def train_step(self, *args):
        raise NotImplementedError


@pytest.fixture
def sharded():
    MODEL_WRAPPERS.register_module(module=Sharded)
    yield Sharded
    del MODEL_WRAPPERS.module_dict['Sharded']


@pytest.mark.parametrize('part', ['model', 'backbone'])
def test_models_that_cannot_change_any_more(tiny, tmp_path, sharded, part):
    runner = tiny.make(tmp_path)
    if part == 'model':
        runner.model = sharded(runner.model)
    else:
        runner.model.backbone = sharded(runner.model.backbone)
    with pytest.raises(TypeError, match="RepAdapterHook.*'lors_plugin.Adapt"):
        runner.train()


class Averaging(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        raise NotImplementedError


def test_wrapping_anew_keeps_what_is_inside(tiny, tmp_path):
    """Several processes wrap the model of test-time augmentation."""
    runner = tiny.make(tmp_path)
    inside = Averaging(runner.model)
    runner.model = nn.DataParallel(inside)
    rewrap(runner)
    assert runner.model is inside
