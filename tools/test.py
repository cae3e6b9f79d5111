"""Test a detector or a classifier.

    python tools/test.py CONFIG CHECKPOINT [--show-dir DIR] [--out FILE.pkl]

Exit code 2 means a mistake in the command, the config or the data.
"""

import argparse
import os
import pickle
import sys
from importlib import import_module
from pathlib import Path

from mmengine.logging import print_log
from tool_utils import (
    add_common_arguments,
    apply_tta,
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
from lors_plugin.checkpoints.files import write_all
from lors_plugin.engine.checkpoint_fit import (
    check_checkpoint,
    check_checkpoint_path,
)
from lors_plugin.engine.hooks import FinitePredictionsHook, KernelCheckHook
from lors_plugin.engine.image_errors import ImageError
from lors_plugin.engine.preflight import host_of, type_name


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Test a detector or a classifier'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='draw the predictions there',
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window'
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that each window stays open',
    )
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='write the predictions as a pickle'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation by tta_model and tta_pipeline of the '
        'config, or else by horizontal flip',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def apply_visualization(cfg, args):
    """Turn the host's drawing of predictions on."""
    host = host_of(cfg)
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None or host is None:
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the '
            'config and default_scope mmdet or mmpretrain'
        )
    visualizers = dict(
        mmdet='mmdet.DetLocalVisualizer',
        mmpretrain='mmpretrain.UniversalVisualizer',
    )
    if cfg.get('visualizer') is None:
        cfg.visualizer = dict(type=visualizers[host])
    # MMDetection's hook takes other paths for ones below the work directory.
    show_dir = os.path.abspath(args.show_dir) if args.show_dir else None
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if host == 'mmdet':
        hook.draw = True
        if show_dir:
            hook.test_out_dir = show_dir
        if type_name(hook.type) == 'DetVisualizationHook':
            # Ours draws a picture per image, also where names repeat.
            import_module('lors_plugin.visualization.det_visualization_hook')
            hook.type = 'lors_plugin.DetVisualizationHook'
    else:
        hook.update(enable=True, interval=1)
        if show_dir:
            hook.out_dir = show_dir
    if show_dir:
        print_log(f'--show-dir: pictures go to {show_dir}', logger='current')


def apply_args(cfg, args):
    """Apply the arguments that only testing has."""
    check_checkpoint_path(args.checkpoint, 'CHECKPOINT')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if cfg.pop('strategy', None) is not None:
        cfg.pop('runner_type', None)  # the plain Runner tests whole models
    for field in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        if cfg.get(field) is None:
            raise ValueError(f'the config has no {field}: nothing to test')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out {args.out}: must end in .pkl or .pickle')
    if args.out and Path(args.out).is_dir():
        raise ValueError(f'--out {args.out}: is a directory')
    if args.show or args.show_dir:
        apply_visualization(cfg, args)


class PredictionsWriteError(OSError):
    """The predictions could not be written; an older file is as it was."""


def dump_metric(cfg, path):
    """Return the host's metric that collects predictions, to a file."""
    if host_of(cfg) == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Host
    else:
        from mmengine.evaluator import DumpResults as Host

    class Dump(Host):
        """Write the file whole or not at all."""

        def compute_metrics(self, results):
            try:
                write_all({Path(path): lambda to: write_pickle(results, to)})
            except OSError as error:
                raise PredictionsWriteError(
                    f'--out {path} cannot be written ({error}); an older '
                    'file of that name is as it was'
                ) from error
            print_log(f'--out: predictions are in {path}', logger='current')
            return {}

    return Dump(out_file_path=path)


def write_pickle(content, path):
    """Write a pickle."""
    with open(path, 'wb') as file:
        pickle.dump(content, file)


def main(argv=None):
    """Test; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    cfg = load_config(args)
    with user_errors('', args.debug):
        apply_args(cfg, args)
    check_config(cfg, ['test'], args)
    if args.tta:  # from here on `model` is the wrapper
        with user_errors('', args.debug):
            apply_tta(cfg)
    prepare_distributed(cfg, args.debug)
    try:
        runner = build_runner(cfg, args.debug)
        with user_errors('', args.debug):
            check_checkpoint(
                runner.model,
                args.checkpoint,
                trust=args.trust,
                hooks=runner.hooks,
            )
        runner.register_hook(FinitePredictionsHook())
        runner.register_hook(KernelCheckHook())
        if args.out:
            runner.test_evaluator.metrics.append(dump_metric(cfg, args.out))
        kinds = (
            AdapterFileError,
            ConversionError,
            ImageError,
            PredictionsWriteError,
        )
        with user_errors('', args.debug, kinds):
            runner.test()
    finally:
        finish_distributed()
    return 0


if __name__ == '__main__':
    sys.exit(main())
