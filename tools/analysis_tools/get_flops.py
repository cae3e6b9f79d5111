"""Count parameters, multiply-adds and memory of a detector or classifier.

    python tools/analysis_tools/get_flops.py CONFIG [--shape 800 1333]
    python tools/analysis_tools/get_flops.py --update-readme README...

Counts what usual counters miss: the products of adaptive mixing, sampling,
attention, deformable convolutions. No weights are made and nothing is
downloaded. docs/en/user_guides/counting.md says what is counted and how.

Tables in READMEs stand between marks, with paths relative to the README:

    <!-- get_flops: models *_coco.py -->                  a row per config
    <!-- get_flops: parts a_coco.py ../other/b_coco.py -->  a row per part
    <!-- get_flops: stages a_coco.py ../other/b_coco.py -->
                                     a row per number of stages, as table 1 of
                                     LORS; the second config is AdaMixer's
    <!-- get_flops: end -->

Exit code 2 means a mistake in the command or the config, 1 a README whose
tables differ (--check-readme).
"""

import argparse
import json
import re
import sys
import warnings
from pathlib import Path

from mmengine.config import DictAction

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.analysis import (
    PartCounts,
    UncountableError,
    count_config,
    test_shape,
)
from lors_plugin.analysis.weightless import EmptyWeights
from lors_plugin.build import build_model, load_config
from lors_plugin.compat import read_safely
from lors_plugin.utils import text_table

EXIT_DIFFERENT = 1
EXIT_USER_ERROR = 2
MEGA, GIGA = 1e6, 1e9
TABLE = re.compile(
    r'(<!-- get_flops: (models|parts|stages) (.+?) -->\n)(.*?)'
    r'(<!-- get_flops: end -->)',
    re.DOTALL,
)
MARK = re.compile(r'<!-- get_flops: (?!end)')
STAGES = (1, 2, 3, 6, 12, 24)
# In the order in which a query passes through them.
PARTS = (
    'backbone',
    'neck',
    'query_generator',
    'decoder / attention',
    'decoder / sampling',
    'decoder / mixing: generator',
    'decoder / mixing: products',
    'decoder / mixing: low rank',
    'decoder / mixing: output projection',
    'decoder / FFN',
    'decoder / branches',
)


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
        help='run the model on the CPU with real values, for models whose '
        'control flow depends on them (NMS inside); takes time and memory',
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


def millions(number):
    """Format a number of parameters, '-' for none."""
    return f'{number / MEGA:.3f} M' if number else '-'


def billions(number):
    """Format a number of multiply-adds, '-' for none."""
    return f'{number / GIGA:.2f} G' if number else '-'


def run_config(args):
    """Count one config and report."""
    cfg = load_config(args.config, args.cfg_options)
    shape = args.shape and (args.shape * 2)[:2]
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
    print(report(args.config, result, args.batch))
    return 0


def report(name, result, batch):
    """Return the text about one model."""
    counts, shape, padded = result.counts, result.shape, result.padded_shape
    parts = {k: v for k, v in counts.parts.items() if v != PartCounts()}
    if any(name.startswith('decoder / ') for name in parts):
        parts['= decoder'] = counts.within('decoder')
    parts['= total'] = counts.total
    rows = [('part', 'parameters', 'trained', 'shared', 'mult-adds', 'others')]
    for part, value in parts.items():
        numbers = (value.parameters, value.trained, value.shared)
        work = (value.multiply_adds, value.elementwise)
        rows.append(
            (
                part,
                *(f'{number:,}' for number in numbers),
                *(f'{number / GIGA:,.3f} G' for number in work),
            )
        )
    size = f'{batch} x {shape[0]} x {shape[1]}'
    if padded != shape:
        size += f' (padded to {padded[0]} x {padded[1]})'
    lines = [
        f'{name}, images {size}',
        *(f'  {line}' for line in text_table(rows, '<>').split('\n')),
        f'activations, float32: {counts.saved_bytes / MEGA:,.1f} MB kept for '
        'the backward pass,',
        f'  {counts.peak_bytes / MEGA:,.1f} MB at most at once in inference',
        '"shared": used by more than one call of a layer; "others": results '
        'of additions, norms, activations',
    ]
    for operator, times in counts.uncounted.items():
        lines.append(f'NOT COUNTED: {operator}, called {times} times')
    return '\n'.join(lines)


def run_readmes(paths, update):
    """Rewrite or check the tables of READMEs."""
    status, known = 0, {}
    for path in map(Path, paths):
        before = path.read_text(encoding='utf-8')
        after = with_tables(before, path, known)
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


def with_tables(text, readme, known):
    """Return the text of a README with its tables made anew.

    Args:
        text (str): The present text.
        readme (Path): Where it is.
        known (dict): Filled with the counts of models; equal models are
            counted once.

    Returns:
        str: The text as it should be.
    """
    if len(MARK.findall(text)) != len(TABLE.findall(text)):
        raise ValueError(
            f'{readme}: a mark "<!-- get_flops: ... -->" has no kind '
            '("models", "parts" or "stages"), no config or no end'
        )

    def replace(match):
        begin, kind, patterns, _, end = match.groups()
        configs = []
        for pattern in patterns.split():
            paths = sorted(readme.parent.glob(pattern))
            if not paths:
                raise ValueError(f'{readme}: no config is named {pattern}')
            configs += paths
        if kind == 'stages':
            head, *rows = stages_table(*configs)
        else:
            results = {path: count(path, known) for path in configs}
            make = models_table if kind == 'models' else parts_table
            head, *rows = make(results)
        lines = [f'| {" | ".join(row)} |' for row in (head, *rows)]
        lines.insert(1, '|---' + '|--:' * (len(head) - 1) + '|')
        return begin + '\n'.join(lines) + '\n' + end

    return TABLE.sub(replace, text)


def count(path, known):
    """Count the model of a config, or take the counts of an equal one."""
    cfg = load_config(path)
    model = json.dumps(cfg.model.to_dict(), sort_keys=True, default=str)
    key = (model, test_shape(cfg))
    if key not in known:
        known[key] = count_config(cfg)
    return known[key]


def models_table(results):
    """Make a row per config."""
    rows = [
        ('config', 'image', 'parameters', 'decoder', 'shared in it',
         'multiply-adds', 'decoder', 'mixing', 'kept for backward')
    ]  # fmt: skip
    for path, result in results.items():
        counts, shape = result.counts, result.shape
        decoder = counts.within('decoder')
        mixing = counts.within('decoder / mixing')
        kept = counts.saved_bytes
        rows.append(
            (
                f'[{path.stem}]({path.name})',
                f'{shape[0]} x {shape[1]}',
                millions(counts.total.parameters),
                millions(decoder.parameters),
                millions(decoder.shared),
                billions(counts.total.multiply_adds),
                billions(decoder.multiply_adds),
                billions(mixing.multiply_adds),
                f'{kept / GIGA:.{1 if kept >= GIGA else 2}f} GB',
            )
        )
    return rows


def parts_table(results):
    """Make a row per part, two columns per config."""
    head, columns = ['part'], []
    for path, result in results.items():
        head += [f'{path.stem}: parameters', 'multiply-adds']
        columns.append(result.counts)
    names = dict.fromkeys(
        name
        for counts in columns
        for name, part in counts.parts.items()
        if part.parameters or part.multiply_adds
    )
    order = dict(zip(PARTS, range(len(PARTS))))
    rows = [head]
    for name in sorted(names, key=lambda name: order.get(name, len(order))):
        cells = [counts.parts.get(name) for counts in columns]
        rows.append(part_row(name.replace('decoder / ', ''), cells))
    sums = dict(mixing='decoder / mixing', decoder='decoder')
    for title, prefix in sums.items():
        cells = [counts.within(prefix) for counts in columns]
        rows.append(part_row(f'**{title}**', cells))
    return [*rows, part_row('**all**', [counts.total for counts in columns])]


def stages_table(lors, adamixer):
    """Make a row per number of stages: weights of the mixing per stage."""
    rows = [
        ('stages', 'generated matrices, per stage', "of AdaMixer's",
         'output projection, per stage', "of AdaMixer's")
    ]  # fmt: skip
    full = mixing_weights(adamixer, 1)
    for number in STAGES:
        row = [str(number)]
        for shared, own in zip(mixing_weights(lors, number), full):
            row += [millions(shared / number), f'{shared / number / own:.1%}']
        rows.append(row)
    return rows


def mixing_weights(path, stages):
    """Count weights of generators and of output projections, no biases."""
    options = {'model.decoder.num_stages': stages}
    with EmptyWeights():
        decoder = build_model(load_config(path, options)).decoder
    counts = [0, 0]
    for name, param in decoder.mixing.named_parameters():
        if 'bias' not in name:
            counts['out_proj' in name] += param.numel()
    return counts


def part_row(title, parts):
    """Return the cells of one part of all models, empty where it is None."""
    row = [title]
    for part in parts:
        if part is None:
            row += ['', '']
        else:
            row += [millions(part.parameters), billions(part.multiply_adds)]
    return row


def main(argv=None):
    """Count; a mistake of the user's ends with exit code 2."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    read_safely()
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
