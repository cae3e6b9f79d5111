"""Shared stacks by config: what real runners make of them."""

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from lors_plugin.engine.checkpoint_fit import check_checkpoint
from lors_plugin.lors import share_stack
from lors_plugin.lors.hook import LORSHook


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(x=torch.randn(6, generator=generator))


class Model(BaseModel):
    def __init__(self):
        super().__init__(init_cfg=dict(type='Xavier', layer='Linear'))
        self.layers = nn.Sequential(
            *[nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
        )
        self.head = nn.Linear(6, 1)

    def forward(self, x, mode='tensor'):
        out = self.head(self.layers(torch.stack(list(x))))
        if mode == 'loss':
            return dict(loss=(out - 1).square().mean())
        return [out]


SCHEDULE = dict(type='MultiStepLR', milestones=[1], gamma=0.1, end=9)
OPTIMIZER = dict(optimizer=dict(type='AdamW', lr=0.01))
CONFIG = dict(optim_wrapper=OPTIMIZER, param_scheduler=SCHEDULE)
TARGETS = [r'layers\.(\d)\.0']


class Size(BaseMetric):
    """Counts what was tested."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(size=len(results))


def make(tmp_path, name, epochs=2, config=CONFIG, test=False, **kwargs):
    torch.manual_seed(0)
    if test:
        kwargs.update(
            test_dataloader=dict(
                dataset=Numbers(),
                batch_size=4,
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            test_cfg=dict(),
            test_evaluator=[Size()],
        )
    return Runner(
        Model(),
        str(tmp_path / name),
        train_dataloader=dict(
            dataset=Numbers(),
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=OPTIMIZER,
        param_scheduler=SCHEDULE,
        custom_hooks=[
            dict(type='lors_plugin.LORSHook', targets=TARGETS, ranks=2),
            dict(type='EMAHook', momentum=0.5),
        ],
        cfg=config,
        experiment_name=f'{tmp_path.name}_{name}',
        randomness=dict(seed=0),
        default_scope='mmengine',
        log_level='WARNING',
        **kwargs,
    )


def test_trains_what_is_shared(tmp_path):
    runner = make(tmp_path, 'a')
    model = runner.train()
    in_optimizer = [
        id(p)
        for group in runner.optim_wrapper.param_groups
        for p in group['params']
    ]
    assert sorted(in_optimizer) == sorted(map(id, model.parameters()))
    assert model.layers[2][0].shared is model.layers[0][0].shared_weight
    assert model.layers[1][0].up.abs().max() > 0
    assert runner.optim_wrapper.get_lr()['lr'][0] == pytest.approx(1e-3)
    saved = torch.load(tmp_path / 'a/epoch_2.pth', weights_only=False)
    shared = [key for key in saved['state_dict'] if 'shared_weight' in key]
    assert shared == ['layers.0.0.shared_weight']
    key = f'module.{shared[0]}'
    assert not torch.equal(
        saved['ema_state_dict'][key], saved['state_dict'][shared[0]]
    )


def test_resumed_training_goes_on(tmp_path):
    whole = make(tmp_path, 'whole').train()
    make(tmp_path, 'half', epochs=1).train()
    resumed = make(
        tmp_path,
        'resumed',
        load_from=str(tmp_path / 'half/epoch_1.pth'),
        resume=True,
    ).train()
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize('way', ['load_from', 'Pretrained', 'test', 'strict'])
def test_every_way_of_loading_plain_weights(tmp_path, way):
    """They meet the changed model, which maps their keys."""
    torch.manual_seed(7)
    plain, path = Model(), str(tmp_path / 'plain.pth')
    torch.save(dict(state_dict=plain.state_dict()), path)
    share_stack(plain, TARGETS, ranks=2, init='svd')
    options = dict(epochs=0)
    if way in ('load_from', 'test'):
        options['load_from'] = path
    if way == 'test':
        options['test'] = True
    runner = make(tmp_path, 'a', **options)
    if way == 'Pretrained':
        runner.model.init_cfg = dict(type='Pretrained', checkpoint=path)
    runner.test() if way == 'test' else runner.train()
    if way == 'strict':
        state = torch.load(path)['state_dict']
        runner.model.load_state_dict(state, strict=True)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(runner.model.state_dict()[key], value)


def test_only_its_own_part_counts(tmp_path):
    """Stacks elsewhere in the model do not keep the hook from its part."""
    model = nn.ModuleDict(dict(a=Model(), b=Model()))
    hooks = [LORSHook(module=part, targets=TARGETS, ranks=2) for part in 'ab']
    assert all(hook.change(model) is not None for hook in hooks)
    assert model['b'].layers[2][0].rank == 2
    assert all(hook.change(model) is None for hook in hooks)


def test_optimizer_without_a_config(tmp_path):
    runner = make(tmp_path, 'a', config=None)
    with pytest.raises(TypeError, match='not made from a config'):
        runner.train()


def test_checkpoints_are_checked_against_what_the_model_will_be(tmp_path):
    """The tools check files before the run starts, with the plain model."""
    runner = make(tmp_path, 'a', epochs=1)
    plain = Model()
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    model = Model()
    share_stack(model, TARGETS, ranks=2)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'lors.pth')
    for name in ('plain.pth', 'lors.pth'):
        path = str(tmp_path / name)
        fit = check_checkpoint(runner.model, path, hooks=runner.hooks)
        assert fit.complete
    assert type(runner.model.layers[0][0]) is nn.Linear
    share_stack(runner.model, TARGETS, ranks=3)
    with pytest.raises(ValueError, match='have another shape or type there'):
        check_checkpoint(runner.model, path, hooks=runner.hooks)
