"""The model of a config, by hooks or by description, and its images."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch import nn
from torch.utils.data import Dataset

from lors_plugin.adapters import adapters_of
from lors_plugin.analysis.weightless import EmptyWeights
from lors_plugin.build import (
    build_model,
    image_channels,
    load_config,
    padded_shape,
    structure_hooks,
)
from lors_plugin.build import test_pipeline as pipeline_of
from lors_plugin.build import test_shape as shape_of
from lors_plugin.registry import MODELS
from lors_plugin.testing import randomize

VIT = dict(
    type='VisionTransformer',
    arch=dict(
        embed_dims=12, num_layers=2, num_heads=2, feedforward_channels=24
    ),
    img_size=16,
    patch_size=8,
)
CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=VIT,
    head=dict(type='VisionTransformerClsHead', in_channels=12, num_classes=3),
)
ADAPTERS = dict(placement='ffn', hidden_dims=4, dropout=0.0, scale=0.5)
STACKS = dict(targets=[r'layers\.(\d+)\.attn\.proj'], ranks=2)


def config(model=CLASSIFIER, hooks=()):
    return Config(
        copy.deepcopy(
            dict(
                model=model,
                custom_hooks=list(hooks),
                data_preprocessor=dict(
                    num_classes=3, mean=[1.0] * 3, std=[50.0] * 3
                ),
                default_scope='mmpretrain',
            )
        )
    )


def by_hooks():
    """Both hooks; the later one in the list is to run first."""
    return config(
        hooks=[
            dict(
                type='lors_plugin.RepAdapterHook',
                adapter_only=True,
                priority='HIGH',
                **ADAPTERS,
            ),
            dict(type='EMAHook'),
            dict(type='lors_plugin.LORSHook', module='backbone', **STACKS),
        ]
    )


def by_backbone():
    stack = dict(type='lors_plugin.LORSStack', module=VIT, **STACKS)
    adapted = dict(type='lors_plugin.AdaptedModel', module=stack, **ADAPTERS)
    return config(dict(CLASSIFIER, backbone=adapted))


def by_model():
    stack = dict(
        type='lors_plugin.LORSStack',
        module=CLASSIFIER,
        part='backbone',
        **STACKS,
    )
    return config(
        dict(
            type='lors_plugin.AdaptedModel',
            module=stack,
            part='backbone',
            **ADAPTERS,
        )
    )


WAYS = pytest.mark.parametrize('make', [by_hooks, by_backbone, by_model])


class Pictures(Dataset):
    """One picture, as a test pipeline packs it."""

    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 1

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        image = np.linspace(0, 255, 3 * 16 * 16).reshape(3, 16, 16)
        return dict(
            inputs=torch.from_numpy(image).float(),
            data_samples=DataSample().set_gt_label(1),
        )


def run(cfg, work_dir, checkpoint):
    """A runner that has tested a checkpoint."""
    runner = Runner(
        cfg.model,
        str(work_dir),
        test_dataloader=dict(
            dataset=Pictures(),
            batch_size=1,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        test_cfg=dict(),
        test_evaluator=dict(type='Accuracy'),
        # EMAHook has no averaged weights here.
        custom_hooks=[
            hook for hook in cfg.custom_hooks if hook['type'] != 'EMAHook'
        ],
        data_preprocessor=cfg.data_preprocessor,
        load_from=str(checkpoint),
        default_scope='mmpretrain',
        experiment_name=f'{work_dir.parent.name}_{work_dir.name}',
        log_level='WARNING',
    )
    runner.test()
    return runner


@WAYS
def test_all_ways_build_one_model(make):
    wanted, model = build_model(by_hooks()), build_model(make())
    assert type(model) is type(wanted)
    assert list(model.state_dict()) == list(wanted.state_dict())
    grads = [
        {n: p.requires_grad for n, p in m.named_parameters()}
        for m in (wanted, model)
    ]
    assert grads[0] == grads[1]
    assert model.data_preprocessor.mean.flatten().tolist() == [1.0] * 3
    assert list(adapters_of(model)) == [
        f'backbone.layers.{i}.ffn.layers.0.0' for i in (0, 1)
    ]
    assert 'backbone.layers.0.attn.proj.shared_weight' in model.state_dict()


@WAYS
def test_it_is_the_model_that_a_runner_runs(make, tmp_path):
    """What a described model saves is read by one of hooks, and back."""
    model = randomize(build_model(by_hooks()), 1).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    tested = run(make(), tmp_path / 'work', tmp_path / 'a.pth').model
    image = Pictures()[0]['inputs'][None]
    with torch.no_grad():
        assert torch.equal(tested(image), model(image))


@pytest.mark.parametrize('make', [by_backbone, by_model])
def test_described_models_need_no_runner(make, tmp_path):
    """As inferencers and ``init_detector`` build and load them."""
    model = randomize(build_model(by_hooks()), 1).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    cfg = make()
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        other = MODELS.build(
            dict(cfg.model, data_preprocessor=cfg.data_preprocessor)
        )
    load_checkpoint(other, str(tmp_path / 'a.pth'), 'cpu', strict=True)
    image = Pictures()[0]['inputs'][None]
    with torch.no_grad():
        assert torch.equal(other.eval()(image), model(image))


@WAYS
def test_the_base_has_no_adapters(make):
    cfg = make()
    before = copy.deepcopy(cfg.to_dict())
    base = build_model(cfg, adapters=False)
    assert not adapters_of(base)
    assert all(param.requires_grad for param in base.parameters())
    assert 'backbone.layers.0.attn.proj.shared_weight' in base.state_dict()
    assert base.data_preprocessor.mean.flatten().tolist() == [1.0] * 3
    assert cfg.to_dict() == before


@WAYS
def test_without_memory_for_weights(make):
    with EmptyWeights():
        model = build_model(make())
    assert all(param.is_meta for param in model.backbone.parameters())
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    wanted = build_model(make()).state_dict()
    assert shapes == {k: v.shape for k, v in wanted.items()}


def test_hooks_in_the_order_of_a_runner():
    names = [type(hook).__name__ for hook in structure_hooks(by_hooks())]
    assert names == ['LORSHook', 'RepAdapterHook']
    assert structure_hooks(config()) == []
    assert structure_hooks(dict()) == []


def test_bad_options_of_a_described_model():
    cfg = by_backbone()
    cfg.model.backbone.part = 'trunk'
    with pytest.raises(ValueError, match="no part 'trunk'; there are"):
        build_model(cfg)
    cfg = by_backbone()
    cfg.model.backbone.module.rank = 3
    with pytest.raises(TypeError, match='rank'):
        build_model(cfg)


def make_cfg(*steps, scope='mmdet', wrap=None):
    dataset = dict(pipeline=list(steps))
    if wrap == 'one':
        dataset = dict(type='RepeatDataset', dataset=dataset)
    if wrap == 'several':
        other = dict(type='RepeatDataset', dataset=dataset)
        dataset = dict(type='ConcatDataset', datasets=[other, dataset])
    return dict(
        default_scope=scope, test_dataloader=dict(dataset=dataset), model={}
    )


@pytest.mark.parametrize(
    ('cfg', 'shape'),
    [
        (make_cfg(dict(type='Resize', scale=(1333, 800), keep_ratio=True)),
         (800, 1333)),
        (make_cfg(dict(type='mmdet.Resize', scale=(640, 480))), (480, 640)),
        (make_cfg(dict(type='Resize', scale=96), wrap='one'), (96, 96)),
        (make_cfg(dict(type='Resize', scale=96), wrap='several'), (96, 96)),
        (make_cfg(dict(type='ResizeEdge', scale=256),
                dict(type='CenterCrop', crop_size=224)), (224, 224)),
        (make_cfg(), (800, 1333)),
        (make_cfg(scope='mmpretrain'), (224, 224)),
        (dict(model={}), (224, 224)),
        (dict(model={}, test_dataloader=None), (224, 224)),
    ],
)  # fmt: skip
def test_shape_of_the_test_pipeline(cfg, shape):
    assert shape_of(cfg) == shape


def test_pipeline_inside_wrappers():
    step = dict(type='Resize', scale=96)
    assert pipeline_of(make_cfg(step, wrap='several')) == [step]


def test_padding(tiny_detector):
    assert padded_shape(tiny_detector(), (33, 64)) == (64, 64)


def test_data_preprocessor_as_the_runner_adds_it():
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='LeNet5', num_classes=10),
            ),
            data_preprocessor=dict(mean=[33.0], std=[79.0], num_classes=10),
        )
    )
    model = build_model(cfg)
    assert model.data_preprocessor.mean.item() == 33
    assert 'data_preprocessor' not in cfg.model
    assert image_channels(model) == 1


@pytest.mark.parametrize(
    ('model', 'channels'),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.Conv2d(4, 8, 1)), 4),
        (nn.Linear(5, 3), 3),
    ],
)
def test_channels(model, channels):
    assert image_channels(model) == channels


def test_configs_of_packages_and_options():
    cfg = load_config(
        'mmpretrain::lenet/lenet5_mnist.py', {'model.backbone.num_classes': 7}
    )
    assert cfg.model.backbone.num_classes == 7
    logits = build_model(cfg)(torch.zeros(2, 1, 32, 32))
    assert logits[-1].shape[-1] == 7


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match='no config .*x.py'):
        load_config(tmp_path / 'x.py')
    (tmp_path / 'x.py').write_text('a = 1\n')
    with pytest.raises(ValueError, match='x.py has no model'):
        load_config(tmp_path / 'x.py')
