"""Helpers of ``train.py``, ``test.py`` and other tools."""

import argparse
import contextlib
import datetime
import os
import sys
from copy import deepcopy

import torch
from mmengine.config import ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from lors_plugin.compat import is_worth_telling, read_safely
from lors_plugin.config_file import (
    ConfigVariableError,
    check_inherited_variables,
    find_config,
    read_config,
)
from lors_plugin.engine.data_check import check_data
from lors_plugin.engine.hooks import ClassNamesHook
from lors_plugin.engine.image_errors import ImageError, name_images_of
from lors_plugin.engine.preflight import (
    check_data_paths,
    host_of,
    iter_datasets,
    type_name,
)
from lors_plugin.engine.strategies import check_strategy
from lors_plugin.utils import is_first_rank

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def add_common_arguments(parser):
    """Add the arguments of both tools to a parser."""
    parser.add_argument(
        '--work-dir',
        help='directory for logs and checkpoints; by default '
        './work_dirs/<name of the config>',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config, for example '
        'train_dataloader.batch_size=4 key="[a,b]" key=a,b; lists by index: '
        'optim_wrapper.0.lr=1e-4; no white space within a value',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow checkpoints to run code of their own while they are '
        'read; only for files from people you trust',
    )
    parser.add_argument(
        '--no-checks',
        action='store_true',
        help='do not check annotation files and the classes of model, data '
        'and files, for a class-agnostic head for example, nor look for '
        'variables that a config sets in vain',
    )
    parser.add_argument(
        '--debug',
        action='store_true',
        help='show the whole traceback of a mistake in the config',
    )
    parser.add_argument(
        '--local-rank',
        '--local_rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


@contextlib.contextmanager
def user_errors(step, debug, kinds=(ValueError, FileNotFoundError)):
    """Turn a user's mistake into one message and exit code 2, Ctrl-C into 130.

    Args:
        step (str): What was being done, or '' if the message says it all.
        debug (bool): Whether to show the traceback instead.
        kinds (tuple): The exceptions that are taken for mistakes.
    """
    try:
        yield
    except kinds as error:
        if debug:
            raise
        # An image is one process's own; all else fails in each of them.
        if is_first_rank() or isinstance(error, ImageError):
            text = str(error.args[0]) if error.args else str(error)
            if isinstance(error, OSError):
                text = str(error)
            if step:
                text = f'{step}: {type(error).__name__}: {text}\n'
                text += '(--debug shows the whole traceback)'
            sys.stderr.write(f'error: {text}\n')
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        if debug:
            raise
        if is_first_rank():
            sys.stderr.write('\ninterrupted\n')
        raise SystemExit(EXIT_INTERRUPTED) from None


def load_config(args):
    """Load the config and apply the arguments that both tools have.

    Args:
        args (:obj:`argparse.Namespace`): The parsed arguments.

    Returns:
        :obj:`Config`: The config with launcher and working directory.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    read_safely(args.trust)  # configs may be YAML
    with user_errors('', args.debug):
        path = find_config(args.config)
    with (
        user_errors(f'{args.config} cannot be read', args.debug, (Exception,)),
        user_errors('', args.debug, (ConfigVariableError,)),
    ):
        cfg = read_config(path, args.cfg_options)
        if not args.no_checks:
            check_inherited_variables(path, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = f'./work_dirs/{path.stem}'
    set_host_defaults(cfg)
    return cfg


def set_host_defaults(cfg):
    """Do what the host's own tools do to a config before a run."""
    if host_of(cfg) == 'mmdet':
        with contextlib.suppress(ImportError):
            from mmdet.utils import setup_cache_size_limit_of_dynamo

            setup_cache_size_limit_of_dynamo()
    if host_of(cfg) == 'mmpretrain':
        for phase in ('train', 'val', 'test'):
            loader = cfg.get(f'{phase}_dataloader')
            if loader:
                loader.setdefault('collate_fn', dict(type='default_collate'))
                loader.setdefault('pin_memory', torch.cuda.is_available())
                if loader.get('num_workers', 0) > 0:
                    loader.setdefault('persistent_workers', True)


def check_config(cfg, phases, args):
    """Check paths, classes and annotation files of the data sets."""
    with user_errors('', args.debug):
        if 'train' in phases:
            check_strategy(cfg)
        check_data_paths(cfg, phases)
        if not args.no_checks:
            check_data(cfg, phases)


def prepare_distributed(cfg, debug=False):
    """Start several processes on the CPU where there is no GPU.

    MMEngine's launchers select a CUDA device, so on the CPU the process
    group is made here, before the runner looks for one.
    """
    if cfg.launcher == 'none' or torch.cuda.is_available():
        return
    with user_errors('', debug):
        if cfg.launcher != 'pytorch':
            raise ValueError(
                f'--launcher {cfg.launcher} needs CUDA, which is not '
                'available; on CPUs use tools/dist_train.sh'
            )
        if 'RANK' not in os.environ:
            raise ValueError(
                '--launcher pytorch needs torchrun; use tools/dist_train.sh'
            )
    if 'env_cfg' not in cfg:
        cfg.env_cfg = ConfigDict()
    dist_cfg = cfg.env_cfg.setdefault('dist_cfg', ConfigDict())
    dist_cfg.backend = 'gloo'
    options = {}
    if dist_cfg.get('timeout') is not None:
        options['timeout'] = datetime.timedelta(seconds=dist_cfg.timeout)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo', **options)
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:
        wrapper = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    kind = str(wrapper.get('type', 'MMDistributedDataParallel'))
    if 'DistributedDataParallel' in kind:
        wrapper = dict(wrapper, device_ids=None)
    cfg.model_wrapper_cfg = wrapper
    strategy = cfg.get('strategy') or {}
    on_cpu = dict(
        DDPStrategy=dict(broadcast_buffers=False, device_ids=None),
        FSDPStrategy=dict(device_id='cpu'),
    ).get(type_name(strategy.get('type', '')))
    if on_cpu:
        strategy.model_wrapper = {
            **(strategy.get('model_wrapper') or {}),
            **on_cpu,
        }
    print_log(
        'CUDA is not available: '
        f'{torch.distributed.get_world_size()} CPU processes by gloo',
        logger='current',
    )


def finish_distributed():
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and (
        torch.distributed.is_initialized()
    ):
        torch.distributed.destroy_process_group()


def build_runner(cfg, debug=False):
    """Build the runner and with it the model."""
    kinds = (ValueError, TypeError, KeyError, AssertionError, ImportError)
    kinds += (OSError,)  # of the work directory, too
    with user_errors('cannot build what the config describes', debug, kinds):
        custom = 'runner_type' in cfg
        runner = RUNNERS.build(cfg) if custom else Runner.from_cfg(cfg)
    runner.logger.addFilter(is_worth_telling)
    name_images_of(runner)
    runner.register_hook(ClassNamesHook())
    return runner


TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
    mmpretrain=dict(type='AverageClsScoreTTA'),
)


def flip_pipeline(pipeline, host):
    """Return a test pipeline that makes each image and its mirror image.

    Args:
        pipeline (list[dict]): It ends with packing.
        host (str): 'mmdet' or 'mmpretrain'.

    Returns:
        list[dict]: The last step is ``TestTimeAug``.
    """
    if not pipeline:
        raise ValueError('--tta: a test data set has no pipeline')
    *steps, pack = deepcopy(pipeline)
    if type_name(pack['type']) not in ('PackDetInputs', 'PackInputs'):
        raise ValueError(
            f'--tta: the test pipeline ends with {pack["type"]} and not with '
            'packing; define tta_pipeline in the config'
        )
    if host == 'mmdet':
        meta_keys = pack.get('meta_keys') or (
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'
        )  # fmt: skip
        extra = ('flip', 'flip_direction')
        pack['meta_keys'] = tuple(dict.fromkeys((*meta_keys, *extra)))
    flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
    return [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def apply_tta(cfg):
    """Wrap the model and replace the pipeline for test-time augmentation.

    What the config does not define is what the host's own tool takes: the
    image and its mirror image, merged by NMS or by the mean score.
    """
    host = host_of(cfg)
    datasets = [d for _, d in iter_datasets(cfg.test_dataloader.dataset, '')]
    missing = [k for k in ('tta_model', 'tta_pipeline') if k not in cfg]
    if missing and host is None:
        raise ValueError(
            f'--tta: the config has no {" and no ".join(missing)}, and only '
            'default_scope mmdet and mmpretrain have a default'
        )
    if 'tta_model' in missing:
        cfg.tta_model = deepcopy(TTA_MODELS[host])
    pipelines = [deepcopy(cfg.get('tta_pipeline')) for _ in datasets]
    if 'tta_pipeline' in missing:
        pipelines = [flip_pipeline(d.get('pipeline'), host) for d in datasets]
    if missing:
        print_log(
            f'--tta: the config has no {" and no ".join(missing)}; taking '
            f'the default of {host}, horizontal flip and '
            f'{cfg.tta_model.type}',
            logger='current',
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset, pipeline in zip(datasets, pipelines):
        dataset.pipeline = pipeline
