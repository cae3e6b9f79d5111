"""Merge what merges for inference: adapters, branches, shared layers.

    python tools/reparam.py CONFIG CHECKPOINT OUT.pth
    python tools/reparam.py CONFIG OUT_DIR --adapter A.pth B.pth --base BASE

Writes the weights and a config of the plain architecture, which MMDetection
or MMPretrain load strictly without this package, unless the model itself
comes from it. Outputs of both models are compared first.

Exit code 1 means that they differ too much, 2 a mistake in the command or
the files; nothing is written then. docs/en/user_guides/reparam.md says more.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from tool_utils import user_errors

import lors_plugin  # noqa: F401  (makes mmcv.ops importable)
from lors_plugin.compat import read_safely

EXIT_DIFFERENT = 1
TOLERANCES = dict(float32=1e-4, float16=2e-2, bfloat16=1e-1)
MISTAKES = (ValueError, OSError)
# Also what models raise that cannot run: without compiled operators, say.
RUNNING = (*MISTAKES, RuntimeError)
BUILDING = (*MISTAKES, TypeError, KeyError, AssertionError, ImportError)


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config of the training')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='weights of the whole model, also .safetensors; averaged (EMA) '
        'ones are taken where there are any',
    )
    parser.add_argument(
        'out',
        help='where to write, .pth or .safetensors; a directory with '
        '--adapter',
    )
    parser.add_argument(
        '--out-config',
        metavar='FILE.py',
        help='where to write the config (default: beside OUT, as .py)',
    )
    add_adapter_arguments(parser)
    add_comparing_arguments(parser)
    parser.add_argument(
        '--dtype',
        choices=TOLERANCES,
        default='float32',
        help='of the written weights; all is computed in float64 and rounded '
        'once (default: %(default)s)',
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='take the plain weights even if there are averaged ones',
    )
    parser.add_argument(
        '--force', action='store_true', help='overwrite what is there'
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow files to run code of their own while they are read; only '
        'for files from people you trust',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config',
    )
    parser.add_argument(
        '--debug', action='store_true', help='show the whole traceback'
    )
    args = parser.parse_args(argv)
    if args.adapter and (args.checkpoint or not args.base):
        parser.error('--adapter: give CONFIG, OUT_DIR and --base BASE')
    if not args.adapter and (not args.checkpoint or args.base):
        parser.error('give CONFIG, CHECKPOINT and OUT; --base needs --adapter')
    if args.adapter and args.out_config:
        parser.error('--out-config: configs get the names of the adapters')
    if min([args.num_images, *args.batches, *(args.shape or [1])]) < 1:
        parser.error('--shape, --num-images and --batches are at least 1')
    if args.tolerance is None:
        args.tolerance = TOLERANCES[args.dtype]
    return args


def add_adapter_arguments(parser):
    """What concerns files of adapters."""
    group = parser.add_argument_group('adapters in files of their own')
    group.add_argument(
        '--adapter',
        nargs='+',
        metavar='FILE',
        help='files with adapters alone, merged one after the other into '
        'files of their names in OUT_DIR',
    )
    group.add_argument(
        '--base', metavar='FILE', help='the weights they were trained on'
    )
    group.add_argument(
        '--rename',
        nargs=2,
        action='append',
        default=[],
        metavar=('REGEX', 'NAME'),
        help='rename keys of files of other programs first, as re.sub does: '
        "'LAYER.rep_adapter.' has to precede conv_A and conv_B; can be "
        'repeated',
    )
    group.add_argument(
        '--scale',
        type=float,
        help='of adapters in the original layout, whose files hold none '
        "(default: that of the config's RepAdapterHook)",
    )


def add_comparing_arguments(parser):
    """What concerns the comparison of outputs and costs."""
    group = parser.add_argument_group('comparison')
    group.add_argument(
        '--images', nargs='+', metavar='FILE', help='default: random ones'
    )
    group.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="of all images (default: from the config's test pipeline)",
    )
    group.add_argument(
        '--num-images', type=int, default=2, help='number of random images'
    )
    group.add_argument('--seed', type=int, default=0, help='of these')
    group.add_argument(
        '--tolerance',
        type=float,
        help='largest difference as a share of the largest value (default: '
        + ', '.join(f'{v:g} for {k}' for k, v in TOLERANCES.items())
        + ')',
    )
    group.add_argument(
        '--batches',
        type=int,
        nargs='+',
        default=[1],
        metavar='N',
        help='numbers of images to measure the time for (default: 1)',
    )
    group.add_argument(
        '--repeats',
        type=int,
        default=10,
        help='passes to take the median time of, 0 to count and measure '
        'nothing (default: %(default)s)',
    )


def load_config(args):
    """Read the config of the training."""
    if '::' in args.config:
        from mmengine.hub import get_config

        cfg = get_config(args.config)
    else:
        if not Path(args.config).is_file():
            raise FileNotFoundError(f'there is no config {args.config}')
        cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    read_safely(args.trust)
    if cfg.get('model') is None:
        raise ValueError(f'{args.config} has no model')
    return cfg


def load_images(args, cfg):
    """Images as uint8 tensors (3, H, W), all of one shape."""
    from lors_plugin.analysis import test_shape

    height, width = args.shape or test_shape(cfg)
    if args.images is None:
        rng = torch.Generator().manual_seed(args.seed)
        shape = (args.num_images, 3, height, width)
        return list(
            torch.randint(256, shape, generator=rng, dtype=torch.uint8)
        )
    import mmcv

    images = []
    for path in args.images:
        if not Path(path).is_file():
            raise FileNotFoundError(f'--images: there is no {path}')
        image = mmcv.imread(path)
        if image is None:
            raise ValueError(f'--images: {path} is no image')
        image = mmcv.imresize(image, (width, height))
        images.append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    return images


def main(argv=None):
    """Merge; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    from reparam_jobs import Jobs

    with user_errors('the config cannot be read', args.debug, (Exception,)):
        cfg = load_config(args)
    with user_errors('', args.debug, MISTAKES):
        jobs = Jobs(args, cfg, load_images(args, cfg))
    with user_errors('the model cannot be built', args.debug, BUILDING):
        jobs.build()
    with user_errors('', args.debug, RUNNING):
        same = [jobs.run(job) for job in jobs.all()]
    return 0 if all(same) else EXIT_DIFFERENT


if __name__ == '__main__':
    sys.exit(main())
