"""A tiny model with adapters in a real runner, for several test files."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset


@pytest.fixture(autouse=True)
def scope():
    """Runners leave their default scope behind, which others would find."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(x=torch.randn(6, generator=generator))


class Block(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.used = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.used(self.norm(x)).relu()


def to_file(model, state, prefix, meta):
    return type(state)(
        (key.replace('backbone.', 'trunk.'), value)
        for key, value in state.items()
    )


def from_file(state, *_):
    for key in list(state):
        state[key.replace('trunk.', 'backbone.')] = state.pop(key)


class Model(BaseModel):
    """A backbone and a head; the first layer is Xavier's by its init_cfg.

    Args:
        renamed (bool): Have other names in files, as TimmClassifier does.
    """

    def __init__(
        self, pretrained=None, norm=False, images=False, renamed=False
    ):
        init = dict(type='Xavier', layer='Linear')
        if pretrained:
            init = dict(type='Pretrained', checkpoint=str(pretrained))
        super().__init__(init_cfg=init)
        self.backbone = nn.Sequential(Block(norm), Block(norm))
        self.head = nn.Linear(6, 1)
        if renamed:
            self._register_state_dict_hook(to_file)
            self._register_load_state_dict_pre_hook(from_file)
        if images:  # of three channels and two pixels
            self.backbone.insert(0, nn.Flatten())
            self.backbone.img_size = (1, 2)

    def forward(self, x, mode='tensor'):
        out = self.head(self.backbone(torch.stack(list(x))))
        if mode == 'loss':
            return dict(loss=(out - 1).square().mean())
        return list(out)


class Distance(BaseMetric):
    """Mean squared distance of the outputs to one."""

    def process(self, data_batch, data_samples):
        self.results += [(x - 1).square().item() for x in data_samples]

    def compute_metrics(self, results):
        return dict(distance=sum(results) / len(results))


SCHEDULE = dict(type='MultiStepLR', milestones=[1], gamma=0.1, end=9)


LOADER = dict(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False))


def make(
    tmp_path,
    name='a',
    epochs=2,
    adapt=None,
    hooks=(),
    model=None,
    cfg=None,
    **kwargs,
):
    """A runner in ``tmp_path / name``.

    Args:
        epochs (int): To train; 0 for a runner that only tests.
        adapt (dict): Options of the hook.
        hooks (list[dict]): More custom hooks.
        model (dict): Options of :class:`Model`.
        cfg (dict): More entries of the config.
    """
    torch.manual_seed(0)
    adapt = dict(adapt or {})
    if 'method' not in adapt:
        usual = dict(targets=[r'\d\.used'], hidden_dims=4, dropout=0.0)
        adapt = {**usual, **adapt}
    if epochs == 0:
        kwargs.update(
            test_dataloader=dict(dataset=Numbers(), **LOADER),
            test_cfg=dict(),
            test_evaluator=[Distance()],
        )
    else:
        kwargs.update(
            train_dataloader=dict(dataset=Numbers(), **LOADER),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
            param_scheduler=SCHEDULE,
        )
    return Runner(
        Model(**(model or {})),
        str(tmp_path / name),
        custom_hooks=[
            dict(type='lors_plugin.RepAdapterHook', **adapt),
            *hooks,
        ],
        cfg=dict(
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5)),
            param_scheduler=SCHEDULE,
            **(cfg or {}),
        ),
        experiment_name=f'{tmp_path.name}_{name}',
        randomness=dict(seed=0),
        default_scope='mmengine',
        log_level='WARNING',
        **kwargs,
    )


@pytest.fixture
def tiny():
    """The model, its data and metric, and what makes its runner."""
    return SimpleNamespace(
        Model=Model,
        Numbers=Numbers,
        Distance=Distance,
        LOADER=LOADER,
        make=make,
    )
