"""The command line of the benchmarks, and what they all do with it."""

import argparse
import sys
import time
from typing import Optional

import torch
from harness import (
    BACKENDS,
    DTYPES,
    MODES,
    PLAIN,
    GateError,
    Lane,
    available_backends,
    check_lanes,
    peak_memory,
    profile_table,
    saved_bytes,
    time_lanes,
    training_memory,
)
from report import Case, Report, cpu_kernels

EXIT_WRONG_RESULT = 1
DOUBLE = 1e-6  # largest difference in float64
CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)


def make_parser(
    doc: str,
    extra: tuple = (),
    models: tuple = ('adamixer', 'lors'),
    size: tuple = ('r50', 'the configs with R50 at 800x1333'),
) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have.

    Args:
        doc (str): Docstring of the tool.
        extra (tuple): Providers beside 'original' and the backends.
        models (tuple): Whose sizes there are.
        size (tuple): Name of the real size, and what it is.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='where to run (default: %(default)s)',
    )
    add(
        '--models',
        nargs='+',
        choices=models,
        default=list(models),
        help='whose sizes to take (default: all)',
    )
    add(
        '--size',
        choices=[size[0], 'tiny'],
        default=size[0],
        help=f'{size[1]}, or sizes that only try the tool '
        '(default: %(default)s)',
    )
    add('--batch-sizes', nargs='+', type=int, default=[1, 2, 16], metavar='B')
    add('--queries', nargs='+', type=int, default=[100, 300], metavar='N')
    add(
        '--dtypes',
        nargs='+',
        choices=DTYPES,
        default=['float32', 'bfloat16'],
        help='float32, and types of autocast (default: float32 bfloat16)',
    )
    add(
        '--providers',
        nargs='+',
        choices=['original', *BACKENDS, *extra],
        help='what to compare; the reference is always needed for the check '
        '(default: all that run here)',
    )
    add(
        '--modes',
        nargs='+',
        choices=MODES,
        default=list(MODES),
        help='forward as in inference, backward, full (forward and backward '
        'as in training) (default: all)',
    )
    add(
        '--repeats',
        type=int,
        default=30,
        help='rounds that count (default: %(default)s)',
    )
    add(
        '--seconds',
        type=float,
        default=60,
        help='begin no further round of a case after that time, once three '
        'count (default: %(default)s)',
    )
    add(
        '--clock',
        choices=CLOCKS,
        default='wall',
        help='cpu counts the time that the processor works for the benchmark '
        '(all threads), for a machine with other work; take --threads 1, '
        'since waiting threads count too (default: %(default)s)',
    )
    add('--threads', type=int, help='threads on the CPU (default: as it is)')
    add('--seed', type=int, default=0)
    add(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest difference from the reference, root mean square '
        'relative to the result; in half precision beside twice that of the '
        'reference (default: %(default)s)',
    )
    add(
        '--gradient-tolerance',
        type=float,
        default=1e-3,
        help='the same for gradients (default: %(default)s)',
    )
    add(
        '--quick',
        action='store_true',
        help='batch 2, 100 queries, float32, five rounds',
    )
    add('--no-memory', action='store_true', help='measure times only')
    add('--no-plots', action='store_true', help='write the CSV only')
    add(
        '--profile',
        metavar='PROVIDER',
        help='print where the time of a training step of this provider goes, '
        'instead of timing',
    )
    add(
        '--out-dir',
        default='work_dirs/benchmarks',
        help='folder for CSV and plots (default: %(default)s)',
    )
    parser.set_defaults(all_providers=['original', *extra])
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, argv: Optional[list]
) -> argparse.Namespace:
    """Read the command line and fill in what it leaves open."""
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU; take --device cpu')
    if args.device.type == 'cuda' and args.clock == 'cpu':
        parser.error('--clock cpu does not see what a GPU does')
    if args.quick:
        args.batch_sizes, args.queries, args.dtypes = [2], [100], ['float32']
        args.repeats = min(args.repeats, 5)
    if 'float32' not in args.dtypes:
        args.dtypes = ['float32', *args.dtypes]
    if args.threads:
        torch.set_num_threads(args.threads)
    backends = available_backends(args.device, args.dtypes)
    here = [*backends, *args.all_providers]
    if PLAIN in here and not cpu_kernels(args.device):
        here.remove(PLAIN)
    wanted = args.providers or here
    missing = {*wanted} & {*BACKENDS, PLAIN} - {*here}
    if missing:
        parser.error(
            f'--providers {" ".join(sorted(missing))}: cannot run here in '
            f'{" and ".join(args.dtypes)}; `python -m lors_plugin.doctor` '
            'says why'
        )
    args.backends = [name for name in backends if name in wanted]
    args.providers = wanted
    return args


def free_memory(device: torch.device) -> Optional[int]:
    """Free bytes of a device, None if nobody knows."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open('/proc/meminfo', encoding='utf-8') as file:
            for line in file:
                if line.startswith('MemAvailable'):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def leave_out(lanes: list[Lane], needs: dict, device: torch.device) -> None:
    """Do not train lanes that would run out of memory.

    Args:
        lanes (list[Lane]): Lanes of a case; changed in place.
        needs (dict[str, float]): Bytes that each keeps for backward.
        device (torch.device): Where they run.
    """
    free = free_memory(device)
    for lane in lanes:
        # About as much again is needed by backward itself.
        if free is not None and 2 * needs.get(lane.name, 0) > 0.8 * free:
            lane.trains = False
            print(
                f'{lane.name}: training left out, it would keep about '
                f'{needs[lane.name] / 2**30:.1f} GiB for backward'
            )


def run_case(case: Case, report: Report) -> None:
    """Check, measure and report one case."""
    args, device = report.args, report.args.device
    batch = min(case.batch, 2)
    lanes = case.build(batch)
    training = bool({'full', 'backward'} & {*args.modes})
    if not training:
        for lane in lanes:
            lane.trains = False
    if case.double is not None and training:
        check_lanes(case.double(batch), DOUBLE, DOUBLE)
        for lane in lanes:
            lane.trains = False  # outputs only
    errors = check_lanes(lanes, args.tolerance, args.gradient_tolerance)
    for lane in lanes:
        lane.trains = training
    needs = {}
    if training and case.batch > batch:
        for lane in lanes:
            needs[lane.name] = saved_bytes(lane) * case.batch / batch
    if case.batch > batch:
        del lanes
        lanes = case.build(case.batch)
        for lane in lanes:
            lane.trains = lane.trains and training
        leave_out(lanes, needs, device)
    wanted = [lane for lane in lanes if lane.provider in args.providers]
    if args.profile:
        for lane in wanted:
            if lane.provider == args.profile:
                print(f'\n{case.label}, {lane.name}')
                print(profile_table(lane, device))
        return
    times = time_lanes(
        wanted,
        args.modes,
        device,
        args.repeats,
        args.seconds,
        args.seed,
        CLOCKS[args.clock],
    )
    metric = 'time' if args.clock == 'wall' else 'cpu time'
    for lane in wanted:
        error = errors.get(lane.name)
        for mode, seconds in times[lane.name].items():
            values = [1000 * value for value in seconds]
            report.add(case, lane, mode, metric, 'ms', values, error)
            if case.rate and mode != 'backward':
                rates = [case.batch / value for value in seconds]
                report.add(case, lane, mode, 'rate', 'images/s', rates, error)
        if args.no_memory:
            continue
        for mode, kind, size in memory_of(lane, args.modes, device):
            report.add(case, lane, mode, kind, 'MB', [size / 1e6], error)
    report.finish_case(case)


def memory_of(lane, modes, device):
    """Yield (mode, metric, bytes) of a lane."""
    if 'forward' in modes:
        peak = peak_memory(lambda: lane.forward(training=False), device)
        yield 'forward', 'peak memory', peak
    if lane.trains and 'full' in modes:
        found = training_memory(lane, device)
        yield 'full', 'peak memory', found['peak']
        yield 'full', 'kept for backward', found['saved']


def run(name: str, args: argparse.Namespace, cases: list[Case]) -> int:
    """Run all cases of a benchmark.

    Returns:
        int: Exit code; 1 if a lane computes something else than the
        reference, in which case nothing is written.
    """
    report = Report(name, args)
    machine = report.machine
    print(
        f'{name} on {machine["device_name"]} ({machine["device"]}, '
        f'{machine["threads"]} threads), torch {machine["torch"]}, triton '
        f'{machine["triton"] or "not installed"}, compiled mixing '
        f'{machine["cpu_kernels"] or "none"}'
    )
    for case in cases:
        try:
            run_case(case, report)
        except GateError as error:
            sys.stderr.write(f'error: {case.label}: {error}\n')
            return EXIT_WRONG_RESULT
    if not args.profile:
        report.write()
    return 0
