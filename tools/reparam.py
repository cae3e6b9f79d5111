"""Merge what merges for inference: adapters, branches, shared layers.

    python tools/reparam.py CONFIG CHECKPOINT OUT.pth
    python tools/reparam.py CONFIG OUT_DIR --adapter A.pth B.pth --base BASE

Writes the weights and a config of the plain architecture, which MMDetection
or MMPretrain load strictly without this package, unless the model itself
comes from it. Outputs of both are compared first. A folder of PEFT is one
more adapter file, and is written by

    python tools/reparam.py CONFIG --adapter A.pth --base BASE --to-peft DIR

Exit code 1 means that they differ too much, 2 a mistake in the command or
the files; nothing is written then. docs/en/user_guides/reparam.md says more.
"""

import argparse
import sys
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import DictAction
from tool_utils import user_errors

import lors_plugin  # noqa: F401  (makes mmcv.ops importable)
from lors_plugin.adapters import (
    adapters_of,
    is_adapter_checkpoint,
    load_peft,
    to_peft,
    write_peft,
)
from lors_plugin.adapters.inject import detach
from lors_plugin.adapters.peft import CARD, CONFIG, WEIGHTS
from lors_plugin.build import image_channels, load_config, test_shape
from lors_plugin.checkpoints.files import (
    checkpoint_writer,
    load_checkpoint_file,
    read_weights,
    weights_of,
    write_all,
)
from lors_plugin.compat import read_safely
from lors_plugin.reparam.compare import (
    compare_costs,
    compare_outputs,
    own_rounding,
)
from lors_plugin.reparam.deploy import deploy
from lors_plugin.reparam.structure import (
    adapted_model,
    build_base,
    peft_model,
    rename,
    trained_model,
)
from lors_plugin.utils import text_table

EXIT_DIFFERENT = 1
TOLERANCES = dict(float32=1e-4, float16=2e-2, bfloat16=1e-1)
MISTAKES = (ValueError, OSError)
# Also what models raise that cannot run: without compiled operators, say.
RUNNING = (*MISTAKES, RuntimeError)
BUILDING = (*MISTAKES, TypeError, KeyError, AssertionError, ImportError)
NOT_PROVEN = '{} does not say which base it was trained on: it is not checked'
MEGA, GIGA = 1e6, 1e9


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
        nargs='?',
        help='where to write, .pth or .safetensors; a directory with '
        '--adapter; left out with --to-peft',
    )
    parser.add_argument(
        '--out-config',
        metavar='FILE.py',
        help='where to write the config (default: beside OUT, as .py)',
    )
    add_adapter_arguments(parser)
    add_peft_arguments(parser)
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
    args = parser.parse_intermixed_args(argv)
    check_files(parser, args)
    if min([args.num_images, *args.batches, *(args.shape or [1])]) < 1:
        parser.error('--shape, --num-images and --batches are at least 1')
    if args.tolerance is None:
        args.tolerance = TOLERANCES[args.dtype]
    return args


def check_files(parser, args):
    """Check which files are given; without CHECKPOINT the one is OUT."""
    if args.adapter and args.out is None:
        args.checkpoint, args.out = None, args.checkpoint
    peft = args.to_peft is not None
    complete = (args.out is None) == peft
    if args.adapter and (args.checkpoint or not args.base or not complete):
        wanted = 'CONFIG' if peft else 'CONFIG, OUT_DIR'
        parser.error(f'--adapter: give {wanted} and --base BASE')
    if not args.adapter and (not args.checkpoint or args.base or not complete):
        wanted = 'CHECKPOINT and --to-peft' if peft else 'CHECKPOINT and OUT'
        parser.error(f'give CONFIG, {wanted}; --base needs --adapter')
    if args.out_config and (args.adapter or peft):
        parser.error('--out-config: configs get the names of the adapters')
    if args.base_name and not args.to_peft:
        parser.error('--base-name needs --to-peft')
    if args.part and not (args.to_peft or args.adapter):
        parser.error('--part needs --to-peft or --adapter')


def add_peft_arguments(parser):
    """Add the options about folders of PEFT."""
    group = parser.add_argument_group('PEFT')
    group.add_argument(
        '--to-peft',
        metavar='DIR',
        help='do not merge, write adapter_config.json, '
        'adapter_model.safetensors and a model card, which stock peft loads; '
        'of several files each in a directory of its name',
    )
    group.add_argument(
        '--part',
        default='',
        metavar='NAME',
        help='the part of the model that PEFT has, such as '
        'backbone.timm_model (default: the whole model)',
    )
    group.add_argument(
        '--base-name',
        metavar='NAME',
        help='of the base on the Hub, or its path, for adapter_config.json',
    )


def add_adapter_arguments(parser):
    """Add the options about files of adapters."""
    group = parser.add_argument_group('adapters in files of their own')
    group.add_argument(
        '--adapter',
        '--from-peft',
        nargs='+',
        metavar='FILE',
        help='files with adapters alone, or folders of PEFT, merged one after '
        'the other into files of their names in OUT_DIR',
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
    """Add the options about the comparison of outputs and costs."""
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


@dataclass
class Job:
    """One file to read, and the weights and config of the merged model.

    Attributes:
        source (str): The checkpoint, adapter file or folder of PEFT.
        out (Path): Where the weights go.
        out_config (Path): Where the config goes.
    """

    source: str
    out: Path
    out_config: Path

    @property
    def outputs(self):
        """List the files to write."""
        return [self.out, self.out_config]


@dataclass
class PeftJob:
    """One file to read, and a folder of PEFT to write.

    Attributes:
        source (str): The checkpoint or the adapter file.
        out (Path): The folder.
    """

    source: str
    out: Path

    @property
    def outputs(self):
        """List the files to write."""
        return [self.out / name for name in (CONFIG, WEIGHTS, CARD)]


def list_jobs(args):
    """List what the arguments ask for."""
    if args.to_peft is not None:
        folder = Path(args.to_peft)
        sources = args.adapter or [args.checkpoint]
        if len(sources) == 1:
            return [PeftJob(sources[0], folder)]
        jobs = adapter_jobs(sources, folder)
        return [PeftJob(job.source, job.out.with_suffix('')) for job in jobs]
    if args.adapter:
        return adapter_jobs(args.adapter, args.out)
    out = Path(args.out)
    config = Path(args.out_config or out.with_suffix('.py'))
    return [Job(args.checkpoint, out, config)]


def adapter_jobs(sources, out_dir):
    """List a job per adapter file, named after it.

    Files of equal names get the names of their directories too.
    """
    paths = [Path(path) for path in sources]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    counts = Counter(names)
    jobs = []
    for path, name in zip(paths, names):
        if counts[name] > 1:
            name = f'{path.resolve().parent.name}_{name}'
        suffix = '.pth' if path.is_dir() else path.suffix
        out = Path(out_dir) / f'{name}{suffix}'
        jobs.append(Job(str(path), out, out.with_suffix('.py')))
    if len({job.out_config for job in jobs}) < len(jobs):
        raise ValueError(
            f'--adapter: two of {sources} have the same name and directory; '
            'merge them in separate calls'
        )
    return jobs


def check_paths(jobs, config, base=None, force=False):
    """Check all paths before anything that takes time."""
    checkpoints = [job.source for job in jobs] + ([base] if base else [])
    for path in checkpoints:
        if not Path(path).exists():
            raise FileNotFoundError(f'the checkpoint {path} is not there')
    inputs = {Path(path).resolve() for path in (config, *checkpoints)}
    for job in jobs:
        if len(set(job.outputs)) < len(job.outputs):
            raise ValueError(
                f'{job.out} would be both weights and config; name the '
                'weights .pth or .safetensors, or give --out-config'
            )
        for out in job.outputs:
            if out.parent.is_file():
                raise ValueError(
                    f'{out.parent} is a file; OUT needs a directory'
                )
            if out.resolve() in inputs:
                raise ValueError(
                    f'{out} is read too; write somewhere else (OUT, '
                    '--out-config)'
                )
            if out.is_dir():
                raise ValueError(f'{out} is a directory; name a file')
            if out.exists() and not force:
                raise ValueError(f'{out} exists; --force overwrites it')


def load_images(paths, shape, channels, number=2, seed=0):
    """Read images, or make random ones.

    Args:
        paths (list[str], optional): Files; None for random images.
        shape (tuple[int]): Height and width of all images.
        channels (int): 1 or 3 for files.
        number (int): Of random images.
        seed (int): Of random images.

    Returns:
        list[Tensor]: Of shape (channels, H, W), uint8.
    """
    height, width = shape
    if paths is None:
        rng = torch.Generator().manual_seed(seed)
        size = (number, channels, height, width)
        return list(torch.randint(256, size, generator=rng, dtype=torch.uint8))
    import mmcv

    if channels not in (1, 3):
        raise ValueError(f'--images: the model takes {channels} channels')
    images = []
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f'--images: there is no {path}')
        flag = 'color' if channels == 3 else 'grayscale'
        image = mmcv.imread(path, flag=flag)
        if image is None:
            raise ValueError(f'--images: {path} is no image')
        image = mmcv.imresize(image, (width, height))
        image = torch.from_numpy(image).view(height, width, channels)
        images.append(image.permute(2, 0, 1).contiguous())
    return images


def load_model(
    source, cfg, base, base_file=None, trust=False, ema=True, renamed=(),
    scale=None, part='',
):  # fmt: skip
    """Load a trained model.

    Args:
        source (str): A checkpoint, or with ``base_file`` an adapter file or
            a folder of PEFT.
        cfg (Config): Of the training.
        base (nn.Module): From ``build_base``; not changed.
        base_file (str, optional): Weights that the adapters belong to.
        trust (bool): Allow files to run code of their own.
        ema (bool): Take averaged weights where there are any.
        renamed (list[tuple]): Keys to rename, expressions and replacements.
        scale (float, optional): Of adapters in the original layout.
        part (str): Of the model, that PEFT had.

    Returns:
        tuple: The model, and the meta data of the file.
    """
    if base_file is not None and Path(source).is_dir():
        weights = read_weights(base_file, trust, ema)
        print(NOT_PROVEN.format(source))
        return peft_model(base, source, weights, base_file, part), {}
    content = load_checkpoint_file(source, trust)
    state = weights_of(content, ema, source)
    if not is_adapter_checkpoint(content):
        state = rename(state, renamed)
    if base_file is None:
        model = trained_model(
            deepcopy(base), cfg, content, state, source, scale
        )
    else:
        weights = read_weights(base_file, trust, ema)
        model, proven = adapted_model(
            base, cfg, content, state, source, weights, base_file, scale
        )
        if not proven:
            print(NOT_PROVEN.format(source))
    return model, content.get('meta') or {}


def differences(before, after, images, tolerance):
    """Compare outputs and print the differences.

    Returns:
        str: Why the models are not the same, '' if they are.
    """
    found = compare_outputs(before, after, images)
    for item in found:
        print(f'  {item}')
    if all(item.within(tolerance) for item in found):
        return ''
    text = f'the written model is not the same (tolerance {tolerance:g})'
    if hasattr(before, 'extract_feat'):
        share = own_rounding(before, images).relative
        text += (
            '; without merging, its features in float32 are '
            f'{share:.2g} of the largest value from those in float64'
        )
    return text


def report_costs(before, after, shape, batches, repeats):
    """Print the costs of the trained and the merged model."""
    rows = [('', 'parameters', 'mult-adds', *(f'batch {n}' for n in batches))]
    costs = compare_costs([before, after], shape, batches, repeats)
    for name, cost in zip(('before', 'merged'), costs):
        times = (f'{1000 * s:.1f} ms' for s in cost.seconds.values())
        rows.append(
            (
                name,
                f'{cost.parameters / MEGA:.3f} M',
                f'{cost.multiply_adds / GIGA:.3f} G',
                *times,
            )
        )
    for line in text_table(rows, '<>').split('\n'):
        print(f'  {line}')


def merge(
    job, model, meta, cfg, images, dtype, tolerance, batches=(1,), repeats=0,
    allow_plain=False,
):  # fmt: skip
    """Merge a model, compare it and write it.

    Args:
        job (Job): The job.
        model (nn.Module): The trained model; not changed.
        meta (dict): Meta data of its file.
        cfg (Config): Of the training.
        images (list[Tensor]): To compare outputs with.
        dtype (torch.dtype): Of the written weights.
        tolerance (float): Largest difference that is allowed.
        batches (list[int]): Batch sizes to time.
        repeats (int): Passes to time; 0 for no costs.
        allow_plain (bool): Also take a model in which nothing merges.

    Returns:
        bool: False if outputs differ; nothing is written then.
    """
    result = deploy(model, cfg, dtype, allow_plain)
    print(f'{job.source}: {result.merged} modules merged')
    text = differences(model, result.model, images, tolerance)
    if text:
        sys.stderr.write(f'error: {job.source}: {text}; nothing was written\n')
        return False
    if repeats:
        shape = tuple(images[0].shape[1:])
        report_costs(model, result.model, shape, batches, repeats)
    for note in result.notes:
        print(f'  config: {note}')
    text = result.cfg.pretty_text
    write_all(
        {
            job.out: checkpoint_writer(job.out, result.content(meta)),
            job.out_config: lambda path: path.write_text(text, 'utf-8'),
        }
    )
    print(f'  written: {job.out}, {job.out_config}')
    return True


def export(
    job, model, images, dtype, tolerance, part='', base_name=None
):  # fmt: skip
    """Write adapters as a folder of PEFT, and compare what it holds.

    Args:
        job (PeftJob): The job.
        model (nn.Module): The trained model; not changed.
        images (list[Tensor]): To compare outputs with.
        dtype (torch.dtype): Of the written weights.
        tolerance (float): Largest difference that is allowed.
        part (str): The part of the model that PEFT will have.
        base_name (str, optional): Name of the base on the Hub.

    Returns:
        bool: False if outputs differ; nothing is written then.
    """
    adapter = to_peft(model, part, base_name, dtype)
    print(f'{job.source}: {len(adapters_of(model))} adapters as a LoRA')
    again = deepcopy(model)
    detach(again, list(adapters_of(again)))
    load_peft(again, adapter, part)
    text = differences(model, again.eval(), images, tolerance)
    if text:
        sys.stderr.write(f'error: {job.source}: {text}; nothing was written\n')
        return False
    for note in adapter.notes:
        print(f'  {note}')
    write_peft(adapter, job.out)
    print(f'  written: {", ".join(map(str, job.outputs))}')
    return True


def main(argv=None):
    """Merge; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    with user_errors('', args.debug, MISTAKES):
        jobs = list_jobs(args)
        check_paths(jobs, args.config, args.base, args.force)
    read_safely(args.trust)
    with user_errors('the config cannot be read', args.debug, (Exception,)):
        cfg = load_config(args.config, args.cfg_options)
    with user_errors('the model cannot be built', args.debug, BUILDING):
        base = build_base(cfg)
    with user_errors('', args.debug, RUNNING):
        shape = args.shape or test_shape(cfg)
        channels = image_channels(base)
        images = load_images(
            args.images, shape, channels, args.num_images, args.seed
        )
        same = []
        for job in jobs:
            model, meta = load_model(
                job.source, cfg, base, args.base, args.trust, not args.no_ema,
                args.rename, args.scale, args.part,
            )  # fmt: skip
            dtype = getattr(torch, args.dtype)
            if isinstance(job, PeftJob):
                same.append(
                    export(
                        job, model, images, dtype, args.tolerance, args.part,
                        args.base_name,
                    )
                )  # fmt: skip
                continue
            same.append(
                merge(
                    job, model, meta, cfg, images, dtype, args.tolerance,
                    args.batches, args.repeats, bool(args.adapter),
                )
            )  # fmt: skip
    return 0 if all(same) else EXIT_DIFFERENT


if __name__ == '__main__':
    sys.exit(main())
