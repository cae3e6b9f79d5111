"""Trainings that resume under other conditions than they began."""

import itertools

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from lors_plugin.engine.resume import ResumeHook

NUMBER = itertools.count()
COSINE = dict(
    type='CosineAnnealingLR',
    T_max=6,
    eta_min_ratio=0.01,
    convert_to_iter_based=True,
)
WARMUP = dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)
STEPS = dict(type='MultiStepLR', milestones=[2, 4], by_epoch=True)
MOMENTUM = dict(type='LinearMomentum', start_factor=0.5, end=4)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.layer(torch.stack(x)).square().mean())


class Values(Hook):
    """Note learning rate and momentum of each step, one after the other."""

    def __init__(self):
        self.seen = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        (group,) = runner.optim_wrapper.param_groups
        values = group['lr'], group['betas'][0]
        self.seen.setdefault(runner.epoch, []).extend(values)


EPOCHS = dict(by_epoch=True, max_epochs=6)


def train(folder, schedule, batch=1, resume=None, loop=EPOCHS, **saving):
    """Train on six images; return the values of each step, by epoch."""
    values = Values()
    kind = 'DefaultSampler' if loop is EPOCHS else 'InfiniteSampler'
    runner = Runner(
        Model(),
        str(folder),
        train_dataloader=dict(
            batch_size=batch,
            dataset=[dict(x=torch.ones(1)) for _ in range(6)],
            sampler=dict(type=kind, shuffle=False),
        ),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1)),
        param_scheduler=schedule,
        default_hooks=dict(
            checkpoint={'type': 'CheckpointHook', 'interval': 1, **saving}
        ),
        custom_hooks=[values, ResumeHook()],
        resume=resume is not None,
        load_from=resume,
        experiment_name=f'resume_{next(NUMBER)}',
    )
    runner.train()
    assert runner.iter == runner.max_iters
    return values.seen


@pytest.mark.parametrize(('then', 'now'), [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize(
    'schedule',
    [[COSINE], [WARMUP, COSINE], [STEPS], [WARMUP, STEPS, MOMENTUM]],
    ids=['cosine', 'warmup', 'steps', 'momentum'],
)
def test_schedules_end_with_the_training(tmp_path, schedule, then, now):
    """As if the training had always had this batch size."""
    train(tmp_path / 'then', schedule, then)
    whole = train(tmp_path / 'now', schedule, now)
    path = str(tmp_path / 'then' / 'epoch_3.pth')
    found = train(tmp_path / 'on', schedule, now, path)
    assert sorted(found) == [3, 4, 5]
    for epoch, steps in found.items():
        assert steps == pytest.approx(whole[epoch]), epoch


@pytest.mark.parametrize(
    ('lost', 'then', 'word'),
    [
        ('optimizer', [COSINE], 'no state of the optimizer'),
        ('param_schedulers', [COSINE], 'schedules of the config differ'),
        ('', [dict(COSINE, T_max=12)], 'schedules of the config differ'),
        ('', [COSINE, WARMUP], 'schedules of the config differ'),
        ('', [COSINE], ''),
    ],
)
def test_what_a_checkpoint_lacks(tmp_path, capsys, lost, then, word):
    train(tmp_path / 'then', then)
    whole = train(tmp_path / 'now', [COSINE])
    path = tmp_path / 'then' / 'epoch_3.pth'
    content = torch.load(path, weights_only=False)
    content.pop(lost, None)
    torch.save(content, path)
    capsys.readouterr()
    found = train(tmp_path / 'on', [COSINE], resume=str(path))
    for epoch, steps in found.items():
        assert steps == pytest.approx(whole[epoch]), epoch
    said = capsys.readouterr()
    text = said.out + said.err
    assert ('Resuming after epoch 3' in text) == bool(word)
    assert word in text


def test_nothing_is_left_to_train(tmp_path, capsys):
    train(tmp_path / 'then', [COSINE])
    path = str(tmp_path / 'then' / 'epoch_6.pth')
    assert train(tmp_path / 'on', [COSINE], resume=path) == {}
    said = capsys.readouterr()
    assert 'nothing is left to train (6 epochs' in said.out + said.err


def test_loops_over_iterations(tmp_path):
    """Which have no epochs: only another schedule counts."""
    loop = dict(type='IterBasedTrainLoop', max_iters=8, val_interval=9)
    options = dict(loop=loop, by_epoch=False, interval=3)
    short, long = ([dict(WARMUP, end=end)] for end in (4, 8))
    train(tmp_path / 'then', short, **options)
    (whole,) = train(tmp_path / 'now', long, **options).values()
    path = str(tmp_path / 'then' / 'iter_3.pth')
    (found,) = train(tmp_path / 'on', long, 2, path, **options).values()
    assert found == pytest.approx(whole[6:])
