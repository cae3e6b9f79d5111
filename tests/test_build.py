"""One model, whether hooks make it or the config describes it."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch.utils.data import Dataset

from lors_plugin.adapters import adapters_of
from lors_plugin.analysis.weightless import EmptyWeights
from lors_plugin.build import build_model, structure_hooks
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
