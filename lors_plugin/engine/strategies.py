"""Check a config for MMEngine's ``FlexibleRunner`` and its strategies.

What is refused here would train wrong weights without a word, be ignored, or
end in an error that does not say why.
"""

import importlib.util
from pathlib import Path

from lors_plugin.utils import type_name

WRAPPER = 'lors_plugin.ShardedOptimWrapper'
# Options of Runner that FlexibleRunner has elsewhere.
IGNORED = dict(
    activation_checkpointing='model.decoder.with_cp=True, or with_cp of the '
    'backbone',
    model_wrapper_cfg='strategy.model_wrapper',
    sync_bn='strategy.sync_bn',
)
HOOKS = dict(
    EMAHook='weights are loaded before it has made its copy, and there is no '
    'whole model to copy where it is sharded: train with the plain Runner',
    RepAdapterHook='the model is wrapped and has its optimizer before any '
    "hook: describe it in model, by type='lors_plugin.AdaptedModel'",
    LORSHook='the model is wrapped and has its optimizer before any hook: '
    "describe it in model, by type='lors_plugin.LORSStack'",
    FreezeHook='the model is wrapped and has its optimizer before any hook: '
    'freeze by options of the backbone (frozen_stages)',
)


def check_strategy(cfg: dict) -> None:
    """Refuse what cannot work with the strategy of a config.

    Args:
        cfg (:obj:`Config` or dict): The whole config.

    Raises:
        ValueError: With the field, the reason and the remedy of each.
    """
    if type_name(cfg.get('runner_type', 'Runner')) != 'FlexibleRunner':
        if cfg.get('strategy') is not None:
            raise ValueError(
                "strategy: only runner_type='FlexibleRunner' reads it, the "
                'config has another one'
            )
        return
    strategy = cfg.get('strategy') or {}
    kind = type_name(strategy.get('type', 'SingleDeviceStrategy'))
    problems = [
        f'{name}: FlexibleRunner ignores it; set {other}'
        for name, other in IGNORED.items()
        if cfg.get(name)
    ]
    for hook in cfg.get('custom_hooks') or ():
        name = type_name(hook['type'])
        if name in HOOKS:
            problems.append(f'custom_hooks ({name}): {HOOKS[name]}')
    if kind == 'FSDPStrategy':
        problems += _problems_of_fsdp(cfg, strategy)
    elif kind == 'DeepSpeedStrategy':
        problems += _problems_of_deepspeed(cfg, strategy)
    if problems:
        raise ValueError(
            f'with {kind} of FlexibleRunner this config cannot train:\n  '
            + '\n  '.join(problems)
        )


def _problems_of_fsdp(cfg: dict, strategy: dict) -> list[str]:
    wrapper = cfg.get('optim_wrapper') or {}
    kind = type_name(wrapper.get('type', 'OptimWrapper'))
    found = []
    saved = strategy.get('state_dict_cfg', 'local')
    if isinstance(saved, dict):
        saved = saved.get('state_dict_type', 'local')
    if getattr(saved, 'name', saved) not in ('full', 'FULL_STATE_DICT'):
        found.append(
            f'strategy.state_dict_cfg: {saved!r} writes a '
            'directory of shards, from which neither testing nor merging nor '
            "an export can start; set 'full'"
        )
    if wrapper.get('clip_grad') and kind != type_name(WRAPPER):
        found.append(
            f'optim_wrapper.clip_grad: {kind} clips each shard by its own '
            f"norm; set optim_wrapper.type='{WRAPPER}'"
        )
    if cfg.get('resume'):
        found.append(
            'resume: MMEngine 0.10 hands the state of the optimizer to FSDP '
            'as PyTorch 2.0 took it, which fails; start anew from the '
            'weights by load_from'
        )
    if kind in ('AmpOptimWrapper', 'AutocastOptimWrapper'):
        found.append(
            f'optim_wrapper.type: {kind} scales losses per shard, or was not '
            'tried with FSDP; strategy.model_wrapper.mixed_precision is its '
            'own option'
        )
    return found


def _problems_of_deepspeed(cfg: dict, strategy: dict) -> list[str]:
    wrapper = cfg.get('optim_wrapper') or {}
    kind = type_name(wrapper.get('type', 'OptimWrapper'))
    found = []
    if kind != 'DeepSpeedOptimWrapper':
        found.append(
            f'optim_wrapper.type: {kind} steps beside DeepSpeed, which then '
            "averages no gradients; set 'DeepSpeedOptimWrapper'"
        )
    for name, other in (
        ('clip_grad', 'gradient_clipping'),
        ('accumulative_counts', 'gradient_accumulation_steps'),
    ):
        if wrapper.get(name):
            found.append(f'optim_wrapper.{name}: set strategy.{other}')
    zero = strategy.get('zero_optimization') or {}
    if zero.get('stage') == 3 and cfg.get('default_scope') == 'mmdet':
        found.append(
            'strategy.zero_optimization.stage: 3 needs the same modules in '
            'the same order on all ranks, but the losses of a batch without '
            'boxes leave some out, where it fails; set 2'
        )
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('type') == 'lors_plugin.CheckpointHook':
        found.append(
            'default_hooks.checkpoint.type: DeepSpeed writes directories, '
            "which ours does not know; set 'mmengine.CheckpointHook'"
        )
    spec = importlib.util.find_spec('deepspeed')
    if spec is not None and not any(
        Path(folder, 'runtime', 'fp16', 'onebit').is_dir()
        for folder in spec.submodule_search_locations
    ):
        found.append(
            'deepspeed: this version has no runtime.fp16.onebit, which '
            "MMEngine imports; pip install 'deepspeed<0.18'"
        )
    return found
