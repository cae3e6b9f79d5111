"""Count parameters, multiply-adds and memory of a detector or classifier.

    python tools/analysis_tools/get_flops.py CONFIG [--shape 800 1333]
    python tools/analysis_tools/get_flops.py --update-readme README...

Counts what usual counters miss: the products of adaptive mixing, sampling,
attention, deformable convolutions. No weights are made and nothing is
downloaded. docs/en/user_guides/counting.md says what is counted and how.
Exit code 2 means a mistake in the command or the config, 1 a README whose
tables differ (--check-readme).
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from mmengine.config import Config, DictAction

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable

EXIT_DIFFERENT = 1
EXIT_USER_ERROR = 2
MEGA, GIGA = 1e6, 1e9


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'config',
        nargs='?',
        help='config file; mmpretrain::resnet/resnet18_8xb32_in1k.py names '
        'one of an installed package',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the images, or one number for both '
        "(default: from the config's test pipeline)",
    )
    parser.add_argument(
        '--batch',
        type=int,
        default=1,
        help='images (default: %(default)s); all counts are for the batch',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config, for example '
        'model.decoder.num_stages=4',
    )
    parser.add_argument(
        '--json',
        metavar='FILE',
        help='write the counts to a file, - for the terminal',
    )
    parser.add_argument(
        '--real',
        action='store_true',
        help='run the model on the CPU with real numbers, for models whose '
        'way depends on values (NMS inside); takes time and memory',
    )
    readmes = parser.add_mutually_exclusive_group()
    readmes.add_argument(
        '--update-readme',
        nargs='+',
        metavar='README',
        help='rewrite the tables between <!-- get_flops: ... --> marks',
    )
    readmes.add_argument(
        '--check-readme',
        nargs='+',
        metavar='README',
        help='exit with code 1 if a table is not what it would be now',
    )
    args = parser.parse_args(argv)
    readme = args.update_readme or args.check_readme
    if bool(args.config) == bool(readme):
        parser.error('give a CONFIG, or READMEs by --update-readme')
    if args.batch < 1 or (args.shape and len(args.shape) > 2):
        parser.error('--batch is at least 1, --shape one or two numbers')
    if args.shape and min(args.shape) < 1:
        parser.error('--shape is at least 1 x 1')
    return args


def load_config(path, options=None):
    """Read a config of this or of an installed package."""
    if '::' in path:
        from mmengine.hub import get_config

        cfg = get_config(path)
    else:
        cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    if cfg.get('model') is None:
        raise ValueError(f'{path} has no model')
    return cfg


def report(name, result, batch):
    """The lines to print about one model."""
    from lors_plugin.analysis import PartCounts

    counts, shape, padded = result.counts, result.shape, result.padded_shape
    rows = [('part', 'parameters', 'trained', 'shared', 'mult-adds', 'others')]
    parts = {k: v for k, v in counts.parts.items() if v != PartCounts()}
    if any(name.startswith('decoder / ') for name in parts):
        parts['= decoder'] = counts.within('decoder')
    parts['= total'] = counts.total
    for part, value in parts.items():
        rows.append(
            (
                part,
                f'{value.parameters:,}',
                f'{value.trained:,}',
                f'{value.shared:,}',
                f'{value.multiply_adds / GIGA:,.3f} G',
                f'{value.elementwise / GIGA:,.3f} G',
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    size = f'{batch} x {shape[0]} x {shape[1]}'
    if padded != shape:
        size += f' (padded to {padded[0]} x {padded[1]})'
    lines = [f'{name}, images {size}']
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        lines.append('  ' + '  '.join(cells))
    lines += [
        f'activations, float32: {counts.saved_bytes / MEGA:,.1f} MB kept for '
        'the backward pass,',
        f'  {counts.peak_bytes / MEGA:,.1f} MB at most at once in inference',
        '"shared": used by more than one call of a layer; "others": results '
        'of additions, norms, activations',
    ]
    for operator, times in counts.uncounted.items():
        lines.append(f'NOT COUNTED: {operator}, called {times} times')
    return lines


def run_config(args):
    """Count one config and report."""
    from lors_plugin.analysis import UncountableError, count_config

    cfg = load_config(args.config, args.cfg_options)
    shape = args.shape
    if shape and len(shape) == 1:
        shape = shape * 2
    try:
        result = count_config(cfg, shape, args.batch, args.real)
    except UncountableError as error:
        hint = '' if args.real else '; --real runs it with numbers'
        raise ValueError(f'{error}{hint}') from error
    if args.json:
        content = dict(
            config=args.config,
            batch=args.batch,
            shape=result.shape,
            padded_shape=result.padded_shape,
            **result.counts.to_dict(),
        )
        text = json.dumps(content, indent=2) + '\n'
        if args.json == '-':
            sys.stdout.write(text)
            return 0
        Path(args.json).write_text(text, encoding='utf-8')
    for line in report(args.config, result, args.batch):
        print(line)
    return 0


def run_readmes(paths, update):
    """Rewrite or check the tables of READMEs."""
    from flops_tables import ReadmeTables

    tables = ReadmeTables()
    status = 0
    for path in map(Path, paths):
        before = path.read_text(encoding='utf-8')
        after = tables.rewrite(before, path)
        if after == before:
            print(f'{path}: tables are up to date')
        elif update:
            path.write_text(after, encoding='utf-8')
            print(f'{path}: tables rewritten')
        else:
            status = EXIT_DIFFERENT
            sys.stderr.write(
                f'error: {path}: tables differ from what is counted now; '
                'run get_flops.py --update-readme\n'
            )
    return status


def main(argv=None):
    """Count; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    try:
        if args.config:
            return run_config(args)
        return run_readmes(
            args.update_readme or args.check_readme, bool(args.update_readme)
        )
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        text = error.args[0] if error.args else error
        text = error if isinstance(error, OSError) else text
        sys.stderr.write(f'error: {text}\n')
        return EXIT_USER_ERROR


if __name__ == '__main__':
    sys.exit(main())
