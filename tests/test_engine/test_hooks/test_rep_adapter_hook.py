"""Adapters by config: what real runners make of them."""

import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from lors_plugin.adapters import adapters_of


@pytest.fixture(autouse=True)
def scope():
    """Runners leave their default scope behind, which others would find."""
    known = DefaultScope._instance_dict
    before = dict(known)
    yield
    known.clear()
    known.update(before)


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(x=torch.randn(6, generator=generator))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x).relu()


class Model(BaseModel):
    """A backbone and a head; the first layer is Xavier's by its init_cfg."""

    def __init__(self):
        super().__init__(init_cfg=dict(type='Xavier', layer='Linear'))
        self.backbone = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 1)

    def forward(self, x, mode='tensor'):
        out = self.head(self.backbone(torch.stack(list(x))))
        if mode == 'loss':
            return dict(loss=(out - 1).square().mean())
        return [out]


SCHEDULE = dict(type='MultiStepLR', milestones=[1], gamma=0.1, end=9)


def make(tmp_path, name='a', epochs=2, adapt=None, hooks=(), **kwargs):
    torch.manual_seed(0)
    adapt = adapt or dict(targets=[r'\d\.used'])
    return Runner(
        Model(),
        str(tmp_path / name),
        train_dataloader=dict(
            dataset=Numbers(),
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
        param_scheduler=SCHEDULE,
        custom_hooks=[
            dict(
                type='lors_plugin.RepAdapterHook',
                hidden_dims=4,
                dropout=0.0,
                **adapt,
            ),
            *hooks,
        ],
        cfg=dict(
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
            param_scheduler=SCHEDULE,
        ),
        experiment_name=f'{tmp_path.name}_{name}',
        randomness=dict(seed=0),
        default_scope='mmengine',
        log_level='WARNING',
        **kwargs,
    )


def weights(model, adapted):
    keys = [k for k in model.state_dict() if ('rep_adapter' in k) == adapted]
    return {k: model.state_dict()[k].clone() for k in keys}


def test_trains_adapters_and_head_only(tmp_path):
    runner = make(tmp_path)
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


def test_base_weights_stay_as_initialised(tmp_path):
    shorter = make(tmp_path, 'shorter', epochs=1).train()
    longer = make(tmp_path, 'longer').train()
    fresh = weights(shorter, False)
    kept = weights(longer, False)
    assert kept.keys() == Model().state_dict().keys()
    for key in kept:
        same = torch.equal(kept[key], fresh[key])
        assert same == key.startswith('backbone'), key


def test_resumes_and_averages(tmp_path):
    ema = dict(type='EMAHook', momentum=0.5)
    whole = make(tmp_path, 'whole', hooks=[copy.copy(ema)]).train()
    make(tmp_path, 'half', epochs=1, hooks=[copy.copy(ema)]).train()
    runner = make(
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


def test_a_layer_that_is_never_called(tmp_path):
    runner = make(tmp_path, adapt=dict(targets=[r'\d\.(used|unused)']))
    with pytest.raises(
        RuntimeError, match=r'2 adapters got no gradient.*backbone.0.unused'
    ):
        runner.train()


def test_without_a_config_the_way_out_is_named(tmp_path):
    runner = make(tmp_path)
    runner.cfg.pop('optim_wrapper')
    with pytest.raises(TypeError, match='inject_adapters'):
        runner.train()
