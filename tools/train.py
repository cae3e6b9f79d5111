"""Train a detector or a classifier.

    python tools/train.py CONFIG [--amp] [--resume] [--cfg-options ...]

Exit code 2 means a mistake in the command, the config or the data, or that a
checkpoint could not be written. Exit code 75 means that SIGTERM or SIGUSR1
asked the training to stop and that it saved its state: start it again with
--resume.
"""

import argparse
import contextlib
import os
import sys

import torch
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook as HostCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from tool_utils import (
    add_common_arguments,
    build_runner,
    check_config,
    finish_distributed,
    load_config,
    prepare_distributed,
    user_errors,
)

import lors_plugin  # noqa: F401  (makes mmcv.ops importable)
from lors_plugin.adapters import AdapterFileError
from lors_plugin.checkpoints import ConversionError
from lors_plugin.engine.checkpoint_fit import (
    check_checkpoint,
    check_checkpoint_path,
)
from lors_plugin.engine.hooks import FinitePredictionsHook, KernelCheckHook
from lors_plugin.engine.hooks.checkpoint_hook import (
    CheckpointHook,
    CheckpointWriteError,
    ResumeError,
)
from lors_plugin.engine.image_errors import ImageError
from lors_plugin.engine.preflight import type_name
from lors_plugin.engine.resume import ResumeHook, checkpoint_to_resume
from lors_plugin.engine.run_lock import WorkDirError, run_lock

AUTOCAST = 'lors_plugin.AutocastOptimWrapper'
CHECKPOINT_HOOK = 'lors_plugin.CheckpointHook'


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train a detector or a classifier'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'float16', 'bfloat16'],
        help='mixed precision; without a value float16 on CUDA and '
        'bfloat16 on the CPU',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from that checkpoint, or without a value from the '
        'newest whole one in the working directory',
    )
    parser.add_argument(
        '--ignore-lock',
        action='store_true',
        help='train although another process trains in the same working '
        'directory',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def apply_amp(cfg, dtype):
    """Turn mixed precision on, keeping the other optimiser options.

    Args:
        cfg (:obj:`Config`): The config, changed in place.
        dtype (str): 'float16', 'bfloat16' or 'auto'.
    """
    wrapper = cfg.optim_wrapper
    kind = type_name(wrapper.get('type', 'OptimWrapper'))
    if kind in ('AmpOptimWrapper', 'AutocastOptimWrapper'):
        if dtype != 'auto':
            wrapper.dtype = dtype
        print_log(
            f'--amp: the config already trains in mixed precision ({kind}, '
            f'dtype {wrapper.get("dtype", "by default")})',
            logger='current',
        )
        return
    if kind != 'OptimWrapper':
        raise ValueError(
            f'--amp does not know optim_wrapper.type={kind}; set '
            'mixed precision in the config'
        )
    if dtype == 'auto':
        dtype = 'float16' if torch.cuda.is_available() else 'bfloat16'
    wrapper.type = AUTOCAST
    wrapper.dtype = dtype
    print_log(f'--amp: mixed precision with {dtype}', logger='current')


def apply_auto_scale_lr(cfg):
    """Turn the scaling of the learning rate on."""
    scale = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' not in scale:
        raise ValueError(
            '--auto-scale-lr: the config has no auto_scale_lr.'
            'base_batch_size, the batch size that its learning rate is for'
        )
    cfg.auto_scale_lr.enable = True


def use_checkpoint_hook(cfg):
    """Replace MMEngine's checkpoint hook, by which a kill may lose a run.

    Ours takes the same options. Runners for other strategies keep theirs.
    """
    if 'runner_type' in cfg:
        return
    hooks = cfg.get('default_hooks') or ConfigDict()
    # What MMEngine takes where a config says nothing.
    default = ConfigDict(type='CheckpointHook', interval=1)
    hook = hooks.setdefault('checkpoint', default)
    hosts = ('CheckpointHook', 'mmengine.CheckpointHook', HostCheckpointHook)
    if hook and hook.get('type') in hosts:
        hook.type = CHECKPOINT_HOOK
        print_log(
            f'default_hooks.checkpoint: {CHECKPOINT_HOOK} in place of '
            "MMEngine's, so that neither a kill nor a full disk loses the "
            'training',
            logger='current',
        )
    cfg.default_hooks = hooks


def apply_args(cfg, args):
    """Apply the arguments that only training has."""
    use_checkpoint_hook(cfg)
    if args.amp is not None:
        apply_amp(cfg, args.amp)
    if args.auto_scale_lr:
        apply_auto_scale_lr(cfg)
    if args.resume == 'auto':
        cfg.resume = True
        cfg.load_from = None
    elif args.resume is not None:
        cfg.resume = True
        cfg.load_from = args.resume
    if cfg.get('load_from'):
        field = '--resume' if args.resume else 'load_from'
        check_checkpoint_path(cfg.load_from, field)


def check_start(runner, cfg, trust=False):
    """Check that the checkpoint to start from belongs to the model."""
    path = cfg.get('load_from')
    if cfg.get('resume') and not path:
        path = checkpoint_to_resume(cfg.work_dir, trust)
        if path is None:
            print_log(
                f'--resume: no checkpoint in {cfg.work_dir}; training starts '
                'from the beginning',
                logger='current',
            )
            return
        # Else the runner would take what `last_checkpoint` names, unseen.
        runner._load_from = path
    if not path:
        return
    if not any(isinstance(hook, CheckpointHook) for hook in runner.hooks):
        runner.register_hook(ResumeHook())
    if not isinstance(runner, Runner):
        return  # FlexibleRunner has no model yet
    share = 0.0 if cfg.get('resume') else 0.5
    fit = check_checkpoint(
        runner.model, path, share, trust, runner.hooks, bool(cfg.get('resume'))
    )
    if not fit.complete:
        print_log(
            f'load_from: {fit.describe()}\nThe rest keeps its '
            'initialisation; fine for fine-tuning on other classes.',
            logger='current',
        )


def main(argv=None):
    """Train; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    cfg = load_config(args)
    with user_errors('', args.debug):
        apply_args(cfg, args)
    phases = ['train', 'val'] if cfg.get('val_cfg') is not None else ['train']
    check_config(cfg, phases, args)
    with user_errors('', args.debug, (WorkDirError,)), lock(cfg, args):
        train(cfg, args)
    return 0


def lock(cfg, args):
    """Lock the work directory, on the rank that writes."""
    ranks = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    if cfg.launcher != 'none' and any(
        os.environ.get(name, '0') != '0' for name in ranks
    ):
        return contextlib.nullcontext()
    return run_lock(cfg.work_dir, args.ignore_lock)


def train(cfg, args):
    """Train what a config describes."""
    prepare_distributed(cfg, args.debug)
    try:
        runner = build_runner(cfg, args.debug)
        runner.register_hook(FinitePredictionsHook())
        runner.register_hook(KernelCheckHook())
        with user_errors('', args.debug):
            check_start(runner, cfg, args.trust)
        kinds = (
            AdapterFileError,
            CheckpointWriteError,
            ConversionError,
            ImageError,
            ResumeError,
        )
        with user_errors('', args.debug, kinds):
            runner.train()
    finally:
        finish_distributed()


if __name__ == '__main__':
    sys.exit(main())
