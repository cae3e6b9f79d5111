"""Configs for FlexibleRunner: what works, and what is refused by name."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch.distributed.fsdp import StateDictType

from lors_plugin.engine.optim import ShardedOptimWrapper
from lors_plugin.engine.strategies import check_strategy

FOLDER = Path(__file__).parents[2] / 'configs' / 'strategies'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_configs(monkeypatch, name):
    """They hold what the check asks for, and a model that can be built."""
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    check_strategy(cfg)
    assert cfg.model.decoder.type == 'lors_plugin.LORSAdaMixerDecoder'
    assert f'{name.split("-")[-1].split("_")[0]}' in str(cfg.strategy).lower()
    if 'adapter' in name:
        adapted = cfg.model.backbone
        assert adapted.type == 'lors_plugin.AdaptedModel'
        assert adapted.module.type == 'SwinTransformer'
        assert adapted.trainable == [r'norm\d'] and not cfg.custom_hooks


FSDP = dict(
    runner_type='FlexibleRunner',
    strategy=dict(type='FSDPStrategy', state_dict_cfg='full'),
    optim_wrapper=dict(type='lors_plugin.ShardedOptimWrapper'),
)
DEEP = dict(
    runner_type='FlexibleRunner',
    strategy=dict(type='DeepSpeedStrategy'),
    optim_wrapper=dict(type='DeepSpeedOptimWrapper'),
)


@pytest.mark.parametrize(
    ('base', 'change', 'message'),
    [
        (FSDP, dict(runner_type='Runner'), "only runner_type='FlexibleRunner"),
        (
            FSDP,
            dict(optim_wrapper=dict(clip_grad=dict(max_norm=1.0))),
            'clip_grad: OptimWrapper clips .*ShardedOptimWrapper',
        ),
        (
            FSDP,
            dict(optim_wrapper=dict(type='lors_plugin.AutocastOptimWrapper')),
            r'mixed_precision',
        ),
        (FSDP, dict(custom_hooks=[dict(type='EMAHook')]), 'whole model'),
        (
            FSDP,
            dict(custom_hooks=[dict(type='lors_plugin.RepAdapterHook')]),
            'RepAdapterHook.*AdaptedModel',
        ),
        (
            FSDP,
            dict(custom_hooks=[dict(type='lors_plugin.LORSHook')]),
            'LORSHook.*LORSStack',
        ),
        (
            FSDP,
            dict(custom_hooks=[dict(type='lors_plugin.FreezeHook')]),
            'frozen_stages',
        ),
        (FSDP, dict(activation_checkpointing=['backbone']), 'with_cp=True'),
        (FSDP, dict(resume=True), 'by load_from'),
        (
            FSDP,
            dict(strategy=dict(type='FSDPStrategy')),
            "state_dict_cfg: 'local' .* directory of shards",
        ),
        (
            FSDP,
            dict(
                strategy=dict(
                    type='FSDPStrategy',
                    state_dict_cfg=dict(state_dict_type='SHARDED_STATE_DICT'),
                )
            ),
            "'SHARDED_STATE_DICT'",
        ),
        (FSDP, dict(sync_bn='torch'), 'set strategy.sync_bn'),
        (
            DEEP,
            dict(optim_wrapper=dict(type='OptimWrapper')),
            'averages no gradients',
        ),
        (
            DEEP,
            dict(
                optim_wrapper=dict(
                    type='DeepSpeedOptimWrapper', accumulative_counts=2
                )
            ),
            'gradient_accumulation_steps',
        ),
        (
            DEEP,
            dict(
                default_scope='mmdet',
                strategy=dict(
                    type='DeepSpeedStrategy', zero_optimization=dict(stage=3)
                ),
            ),
            'same order on all ranks.*set 2',
        ),
        (
            DEEP,
            dict(
                default_hooks=dict(
                    checkpoint=dict(type='lors_plugin.CheckpointHook')
                )
            ),
            'mmengine.CheckpointHook',
        ),
    ],
)
def test_refused(monkeypatch, base, change, message):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    check_strategy(base)
    check_strategy(dict(base, custom_hooks=[dict(type='DemoHook')]))
    with pytest.raises(ValueError, match=message):
        check_strategy({**base, **change})


@pytest.mark.parametrize(
    'kind', ['FULL_STATE_DICT', StateDictType.FULL_STATE_DICT]
)
def test_whole_checkpoints_by_their_full_name(kind):
    strategy = dict(
        type='FSDPStrategy', state_dict_cfg=dict(state_dict_type=kind)
    )
    check_strategy(dict(FSDP, strategy=strategy))


def test_deepspeed_that_mmengine_does_not_know(monkeypatch, tmp_path):
    package = tmp_path / 'deepspeed'
    (package / 'runtime' / 'fp16').mkdir(parents=True)
    (package / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="pip install 'deepspeed<0.18'"):
        check_strategy(DEEP)
    (package / 'runtime' / 'fp16' / 'onebit').mkdir()
    check_strategy(DEEP)


def test_plain_runner_is_left_alone():
    check_strategy(dict(custom_hooks=[dict(type='EMAHook')]))


class Sharded(torch.nn.Linear):
    """A model that clips itself, as FSDP does."""

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        self.asked = max_norm
        return torch.tensor(7.0)


@pytest.mark.parametrize('kind', [torch.nn.Linear, Sharded])
def test_who_clips(kind):
    model = kind(3, 1)
    wrapper = ShardedOptimWrapper(
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        clip_grad=dict(max_norm=0.5),
    )
    with wrapper.optim_context(model):
        loss = 100 * model(torch.ones(1, 3)).square().sum()
    wrapper.backward(loss)
    before = model.weight.grad.clone()
    wrapper.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if kind is Sharded:
        assert model.asked == 0.5
        assert torch.equal(model.weight.grad, before)
    else:
        assert norm == pytest.approx(0.5, rel=1e-4)
