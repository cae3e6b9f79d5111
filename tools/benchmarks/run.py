"""Measure the speed and memory of this package.

    python tools/benchmarks/run.py --list
    python tools/benchmarks/run.py --quick              # tries all cases
    python tools/benchmarks/run.py decoder --threads 2 --models lors
    python tools/benchmarks/run.py mixing sampling decoder --device cuda \\
        --dtypes float32 bfloat16 float16 --batch-sizes 2 16

All implementations of a case get the same inputs and weights. They are first
compared with the readable reference, outputs and gradients, and then timed in
turns, in a new random order each round. A case whose results differ is not
timed; the exit code is then 1. Each size prints a table of medians (20 to 80
% of the rounds in brackets) and ratios to the original programs' formulation
in float32; benchmarks.csv has all of it, with versions and machine.

On a machine with other work, `--clock process --threads 1` counts processor
time. To compare two commits in one run, check the other one out (`git
worktree add ../old COMMIT`) and add `--against ../old`: all implementations
but the reference and what is independent of the commit then also run with the
package from there, in a child process that takes turns with this one.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

# Read when PyTorch is loaded: its profiler says a lot that is no error.
os.environ['KINETO_LOG_LEVEL'] = os.environ.get('KINETO_LOG_LEVEL', '99')

import torch
from cases import CASES, NEVER_FLOAT64, Case, Size, refusal
from commits import MARK, OtherCommit, serve
from harness import (
    CLOCKS,
    MODES,
    SHORT,
    GateError,
    Implementation,
    check,
    free_memory,
    time_in_turns,
)
from mmengine.logging import MMLogger
from results import Report, device_name

from lors_plugin.version import __version__

FLOAT64_TOLERANCE = 1e-6
Plan = list[tuple[str, str]]  # implementations and their dtypes


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'cases',
        nargs='*',
        metavar='CASE',
        help=f'{", ".join(CASES)} (default: all)',
    )
    add('--list', action='store_true', help='print all cases and exit')
    add(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu, cuda or cuda:N (default: %(default)s)',
    )
    add('--threads', type=int, help='threads on a CPU (default: as it is)')
    models, names = (
        list(dict.fromkeys(n for c in CASES.values() for n in getattr(c, key)))
        for key in ('models', 'implementations')
    )
    add('--models', nargs='+', choices=models, help='default: all of a case')
    add('--batch-sizes', nargs='+', type=int, metavar='B', help='images')
    add('--queries', nargs='+', type=int, metavar='N', help='per image')
    add(
        '--dtypes',
        nargs='+',
        choices=list(SHORT),
        default=['float32'],
        help='float32, and dtypes of autocast (default: float32)',
    )
    add(
        '--modes',
        nargs='+',
        choices=MODES,
        help='forward is inference, full is forward and backward as in '
        'training, backward is its second part (default: forward full)',
    )
    add(
        '--implementations',
        nargs='+',
        choices=names,
        metavar='NAME',
        help=f'{", ".join(names)} (default: those of a case that run here)',
    )
    add(
        '--against',
        type=Path,
        metavar='DIR',
        help='a checkout of another commit to compare with',
    )
    add('--repeats', type=int, default=30, help='rounds (default: 30)')
    add(
        '--budget',
        type=float,
        default=60,
        metavar='SECONDS',
        help='begin no further round of a size after that time, once three '
        'count (default: 60)',
    )
    add(
        '--clock',
        choices=list(CLOCKS),
        default='wall',
        help='process counts the time of the processor, of all threads '
        '(default: wall)',
    )
    add(
        '--quick',
        action='store_true',
        help='tiny models, one batch size, two rounds: numbers mean nothing',
    )
    add(
        '--profile',
        metavar='NAME',
        help="print PyTorch's profile of this implementation, time nothing",
    )
    add(
        '--output',
        type=Path,
        default=Path('work_dirs/benchmarks'),
        help='folder of CSV file and plots (default: %(default)s)',
    )
    add(MARK, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:  # the other process says what to do
        return args
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f'no case {unknown[0]!r}; there are {", ".join(CASES)}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: PyTorch sees no GPU')
    if args.device.startswith('cuda') and args.clock == 'process':
        parser.error('--clock process does not see what a GPU does')
    for name in ('threads', 'repeats'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1')
    if args.against and not (args.against / 'lors_plugin').is_dir():
        parser.error(f'--against {args.against}: no checkout of lors_plugin')
    if args.quick:
        args.repeats = min(args.repeats, 2)
    args.dtypes = list(dict.fromkeys(['float32', *args.dtypes]))
    args.plans = {name: make_plan(name, args) for name in args.cases or CASES}
    if not args.list and not any(map(len, args.plans.values())):
        parser.error(
            f'--implementations {" ".join(args.implementations)}: no chosen '
            'case has one that runs here, see --list'
        )
    return args


def make_plan(name: str, args: argparse.Namespace) -> Plan:
    """Implementations to time, with dtypes; says what cannot run here."""
    case, plan = CASES[name], []
    wanted = args.implementations or case.implementations
    for each in dict.fromkeys(wanted):
        if each not in case.implementations and not args.list:
            print(
                f'{name}: has no {each}, only '
                f'{", ".join(case.implementations)}'
            )
    # Its absence is worth a line also where it is not asked for by name.
    fast = 'triton' if args.device.startswith('cuda') else 'cpu'
    for dtype in args.dtypes if case.memory else ['float32']:
        for each in case.implementations:
            if each not in wanted:
                continue
            reason = refusal(each, args.device, dtype)
            if not reason:
                plan.append((each, dtype))
            elif not args.list and (
                args.implementations or (each, dtype) == (fast, 'float32')
            ):
                print(f'{name}: {each} in {dtype} left out: {reason}')
    return plan


def make_sizes(case: Case, args: argparse.Namespace) -> list[Size]:
    """All sizes of a case; none if it has no model that was asked for."""
    models = [m for m in case.models if m in (args.models or case.models)]
    batches, queries = case.batch_sizes, case.queries
    if batches != (None,):
        batches = args.batch_sizes or ([2] if args.quick else batches)
    if queries != (None,):
        queries = args.queries or ([5] if args.quick else queries)
    return [
        Size(
            *(model, batch, number),
            device=args.device,
            quick=args.quick,
            threads=args.threads or 1,
        )
        for model, number, batch in product(models, queries, batches)
    ]


def prepare(
    name: str,
    size: Size,
    plan: Plan,
    modes: Sequence[str],
    share: float = 1.0,
) -> tuple[list[Implementation], dict[str, float]]:
    """Build and check the implementations of a case at one size.

    They are checked with at most two images. One that would run out of
    memory, of which this process has a ``share``, is not trained.

    Returns:
        tuple: Implementations, and their largest errors by label.

    Raises:
        GateError: If one computes something else than the reference.
    """
    case = CASES[name]
    reference = case.implementations[0]
    dtypes = dict.fromkeys(dtype for _, dtype in plan)
    # The reference is first in each dtype, in which it says what rounds.
    everyone = [
        pair
        for dtype in {'float32': None, **dtypes}
        for pair in [
            (reference, dtype),
            *(p for p in plan if p[1] == dtype and p[0] != reference),
        ]
    ]
    training = bool({'backward', 'full'} & set(modes))

    def build(size, pairs, trains=training):
        made = case.build(size, list(dict.fromkeys(n for n, _ in pairs)))
        return [
            dataclasses.replace(
                made[each], dtype=dtype, trains=trains and made[each].trains
            )
            for each, dtype in pairs
        ]

    small = size
    if size.batch:
        small = dataclasses.replace(size, batch=min(size.batch, 2))
    in_float64 = case.in_float64 and training
    if in_float64:
        wide = dataclasses.replace(small, dtype='float64')
        pairs = dict.fromkeys(
            (n, 'float32') for n, _ in everyone if n not in NEVER_FLOAT64
        )
        check(build(wide, list(pairs)), FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
    here = build(small, everyone, training and not in_float64)
    errors = check(here, case.tolerance, case.gradient_tolerance)
    del here
    here = build(size, plan)
    if training and size.batch and size.batch > small.batch:
        free = share * free_memory(here[0].device)
        for each, less in zip(here, build(small, plan)):
            # Backward needs about as much again as it was kept.
            bytes_ = less.saved_bytes() * size.batch / small.batch
            if each.trains and 2 * bytes_ > 0.8 * free:
                each.trains = False
                print(
                    f'{each.label}: training left out, it would keep about '
                    f'{bytes_ / 2**30:.1f} GiB for backward'
                )
    return here, errors


def measure(name, size, args, report, other) -> None:
    """Check, time and report one size of a case."""
    case, plan = CASES[name], args.plans[name]
    modes = [m for m in MODES if m in (args.modes or case.modes)]
    share = 0.5 if other else 1.0
    here, errors = prepare(name, size, plan, modes, share)
    if args.profile:
        for each in here:
            if each.name == args.profile:
                print(f'\n{name}: {size.label}, {each.label}')
                print(each.profile())
        return
    if other:
        same = 'original', 'products', case.implementations[0]
        shared = [pair for pair in plan if pair[0] not in same]
        there, more = other.prepare(name, size, shared, modes, share)
        here, errors = here + there, {**errors, **more}
    times = time_in_turns(
        *(here, modes, args.repeats, args.budget, args.clock),
        pause=0.05 if other else 0.0,
    )
    metric = 'time' if args.clock == 'wall' else 'processor time'
    rows = []

    def add(each, *values):
        rows.append((each.name, each.dtype, *values, errors.get(each.label)))

    for each in here:
        for mode, seconds in times[each.label].items():
            add(each, mode, metric, 'ms', [1000 * s for s in seconds])
            if case.rate and mode != 'backward':
                rates = [size.batch / s for s in seconds]
                add(each, mode, 'rate', 'images/s', rates)
        for mode, kind, number in each.memory(modes) if case.memory else ():
            add(each, mode, kind, 'MB', [number / 1e6])
        for fact, (value, unit) in each.facts.items():
            add(each, '', fact, unit, [value])
    config = dataclasses.asdict(size)
    report.add(name, size.label, config, case.baseline, rows)


def describe() -> str:
    """Text of ``--list``."""
    blocks = []
    for name, case in CASES.items():
        lines = [line.strip() for line in case.build.__doc__.splitlines()]
        text = '\n    '.join(filter(None, lines))
        blocks.append(
            f'{name}\n    {text}\n    models: {", ".join(case.models)}\n'
            f'    implementations: {", ".join(case.implementations)}'
        )
    return '\n\n'.join(blocks)


def main(argv=None) -> int:
    """Run all cases; 1 if one computed something wrong or failed."""
    args = parse_args(argv)
    if args.list:
        print(describe())
        return 0
    # At level INFO, MMEngine lists all weights that are initialised.
    MMLogger.get_current_instance().setLevel('ERROR')
    if args.serve is not None:
        serve(prepare, args.serve)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ''
    machine = dict(
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton,
        lors_plugin=__version__,
    )
    print(', '.join(f'{k} {v}' for k, v in machine.items() if v != ''))
    report, failed = Report(machine), False
    sizes = {
        name: make_sizes(CASES[name], args) if plan else []
        for name, plan in args.plans.items()
    }
    other = args.against and OtherCommit(args.against, args.threads)
    for name, here in sizes.items():
        for size in here:
            try:
                measure(name, size, args, report, other)
                if report.rows:  # whatever ends this process later
                    report.write_rows(args.output)
            except (GateError, torch.OutOfMemoryError) as error:
                failed = True
                sys.stderr.write(f'error: {name}, {size.label}: {error}\n')
    if other:
        other.close()
    if not any(sizes.values()):
        sys.stderr.write('error: no case has such a model, see --list\n')
        return 2
    if report.rows:
        report.write(args.output)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
