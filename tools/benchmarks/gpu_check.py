"""Check and measure everything on a GPU; called by ``tools/gpu_check.sh``.

Runs in order: the doctor, the self-check of the Triton kernels, the tests for
GPUs, and benchmarks from the most to the least important one, until the time
is up. One folder then holds ``report.md``, ``report.json``, plots and the log
of each part, and beside it lies a ZIP file of it to attach to an issue. The
report is written anew after each part, so whatever stops the command leaves
what was found until then.

Exit code 0: all parts that ran succeeded, or the time was up; 1: one failed;
2: a mistake in the command; 130 and 143: stopped by Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from results import device_name, read_rows, table, write_plots

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / 'tools' / 'benchmarks' / 'run.py'
HALF = ['float32', 'float16', 'bfloat16']
GRACE = 10  # seconds to write results once asked to stop
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A first look at each case within --minutes 10; more time gets more rounds.
BUDGET = 10
LEGEND = (
    'Below: median (20th..80th percentile) and its ratio to the row of 1.00x. '
    '`full` is forward with backward.'
)


@dataclasses.dataclass
class Part:
    """A command of its own.

    Attributes:
        name (str): In the report, and of its log.
        command (list[str]): What is run, in the root of the checkout.
        share (float): Of the whole time at most. Defaults to all.
        environment (dict[str, str]): Added to that of this process.
        status (str): 'ok', 'failed (exit code)', 'time was up', 'stopped' or
            'not run'.
        seconds (float): That it took.
    """

    name: str
    command: list[str]
    share: float = 1.0
    environment: dict = dataclasses.field(default_factory=dict)
    status: str = 'not run'
    seconds: float = 0.0


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog='bash tools/gpu_check.sh',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--minutes', type=float, default=10, help='for all (default: 10)')
    add(
        '--wheels',
        metavar='DIR',
        help='a folder of wheels to install from, without a network',
    )
    add(
        '--output',
        type=Path,
        help='a new folder (default: work_dirs/gpu_check/<date>)',
    )
    add('--only', nargs='+', metavar='PART', help='these parts only')
    add(
        '--device',
        choices=('cuda', 'cpu'),
        default='cuda',
        help='cpu tries the command at tiny sizes; its figures mean nothing',
    )
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f'--minutes {args.minutes:g} must be positive')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error(
            'PyTorch sees no GPU (python -m lors_plugin.doctor says why); '
            '--device cpu tries the command without one'
        )
    if args.output is None:
        name = time.strftime('%Y%m%d-%H%M%S')
        args.output = ROOT / 'work_dirs' / 'gpu_check' / name
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f'--output {args.output} exists and is not empty')
    args.parts = make_parts(args.device, args.output.resolve())
    known = [part.name for part in args.parts]
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        parser.error(f'no part {unknown[0]!r}; there are {", ".join(known)}')
    if args.only:
        args.parts = [p for p in args.parts if p.name in args.only]
    return args


# Cases of tools/benchmarks from the most to the least important.
BENCHMARKS = {
    'mixing': ['mixing', '--dtypes', *HALF, '--batch-sizes', '2', '16'],
    'sampling': ['sampling', '--batch-sizes', '2', '16'],
    'decoder': ['decoder', '--dtypes', *HALF, '--batch-sizes', '2', '16'],
    'detector': ['detector', '--dtypes', *HALF, '--batch-sizes', '2'],
    'decoder-300-queries': [
        *('decoder', '--dtypes', *HALF, '--batch-sizes', '2', '16'),
        *('--queries', '300'),
    ],
    'parameternet': ['parameternet', '--dtypes', *HALF, '--models', '600m'],
    'vit-adapters': ['vit_adapters', '--dtypes', *HALF],
}


def make_parts(device: str, output: Path) -> list[Part]:
    """Return all parts, in their order."""
    python, tiny = sys.executable, device == 'cpu'
    tests = [
        *(python, '-m', 'pytest', '-m', 'gpu', '-v', '-p', 'no:cacheprovider'),
        *('--color=no', '-o', 'console_output_style=classic'),
        *('tests/test_gpu', 'tests/test_training.py'),
    ]
    check = [python, '-m', 'lors_plugin.doctor', '--gpu']
    interpreter = {}
    if tiny:
        interpreter = dict(TRITON_INTERPRET='1', LORS_GPU_TESTS_ON_CPU='1')
        tests += ['-k', 'test_adapters or test_no_queries']
        check = [
            *(python, '-m', 'lors_plugin.ops.self_check.probe'),
            *('cpu', '300', 'sampling float32'),
        ]
    parts = [
        Part('doctor', [python, '-m', 'lors_plugin.doctor'], 0.2),
        Part('self-check', check, 0.45, interpreter),
        Part('tests', tests, 0.25, interpreter),
    ]
    for name, options in BENCHMARKS.items():
        # Less would end it before its first size.
        quick = ['--quick'] if tiny else ['--budget', str(BUDGET)]
        parts.append(
            Part(
                name,
                [
                    *(python, str(RUN), *options, '--device', device, *quick),
                    *('--output', str(output / name)),
                ],
            )
        )
    return parts


class Stop:
    """Notice of the user or the system that this command has to stop.

    Handlers only take a note: an exception could come between the start of a
    part and the moment when it is known.

    Attributes:
        code (int): The exit code, 0 if nothing was asked for.
    """

    def __init__(self) -> None:
        self.code = 0

    def listen(self) -> None:
        """Take note of the signals from now on."""
        for number in STOPS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.code = STOPS[number]


def run_part(part: Part, output: Path, limit: float, stop: Stop) -> None:
    """Run a part for ``limit`` seconds at most, with a log of its own."""
    start, log = time.monotonic(), output / f'{part.name}.log'
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, paths)),
        'PYTHONUNBUFFERED': '1',
        **part.environment,
    }
    with log.open('wb') as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        part.status = ''
        while not part.status:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.1)
                part.status = f'failed ({code})' if code else 'ok'
            if stop.code:
                part.status = 'stopped'
            elif not part.status and time.monotonic() - start > limit:
                part.status = 'time was up'
        end(process)
    part.seconds = time.monotonic() - start


def end(process: subprocess.Popen) -> None:
    """End a part: politely, so that it writes its results, then by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        # It leads a group of its own, with all that it started.
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def run_parts(
    parts: Sequence[Part], output: Path, minutes: float, stop: Stop
) -> int:
    """Run all parts until the time is up; return the exit code."""
    start = time.monotonic()
    for part in parts:
        left = start + 60 * minutes - time.monotonic()
        if left <= 0 or stop.code:
            break
        limit = min(left, 60 * minutes * part.share)
        print(f'{part.name}: {limit:.0f} s at most ...', flush=True)
        run_part(part, output, limit, stop)
        write_report(parts, output)
        print(f'    {part.status}, {part.seconds:.0f} s', flush=True)
    failed = any(part.status.startswith('failed') for part in parts)
    return stop.code or int(failed)


def facts() -> dict:
    """Card, versions and date."""
    from lors_plugin.ops.self_check import find_card
    from lors_plugin.version import __version__

    found = dict(date=time.strftime('%Y-%m-%d'), lors_plugin=__version__)
    if torch.cuda.is_available():
        card = dataclasses.asdict(find_card())
        memory = torch.cuda.get_device_properties(0).total_memory
        return dict(
            card,
            **found,
            memory=f'{memory / 2**30:.0f} GiB',
            number=torch.cuda.device_count(),
        )
    return dict(
        found,
        name=device_name(torch.device('cpu')),
        torch=torch.__version__,
        note='tried on a CPU at tiny sizes: the figures mean nothing',
    )


def test_results(log: str) -> dict[str, list[str]]:
    """Return the names of tests by outcome, also of an unfinished run."""
    found = {}
    for name, outcome in re.findall(
        r'^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)', log, re.MULTILINE
    ):
        found.setdefault(outcome.lower(), []).append(name)
    return found


def write_report(parts: Sequence[Part], output: Path) -> None:
    """Write ``report.md`` and ``report.json`` with what is there so far."""
    about = facts()
    logs = {
        part.name: (output / f'{part.name}.log').read_text('utf-8', 'replace')
        for part in parts
        if part.status != 'not run'
    }
    tests = test_results(logs.get('tests', ''))
    rows = []
    for part in parts:
        path = output / part.name / 'benchmarks.csv'
        rows += read_rows(path) if path.is_file() else []
    lines = [f'# {about["name"]}', '']
    lines += ['| | |', '|---|---|']
    lines += [f'| {key} | {value} |' for key, value in about.items()]
    lines += ['', '| part | result | seconds |', '|---|---|---|']
    for part in parts:
        lines.append(f'| {part.name} | {part.status} | {part.seconds:.0f} |')
    for name in ('doctor', 'self-check'):
        if logs.get(name, '').strip():
            text = logs[name].strip()
            lines += ['', f'## {name}', '', '```text', text, '```']
    if 'tests' in logs:
        counts = [f'{len(names)} {what}' for what, names in tests.items()]
        lines += ['', '## tests', '', ', '.join(counts) or 'none finished']
        wrong = tests.get('failed', []) + tests.get('error', [])
        lines += [f'- {name}' for name in wrong]
    if rows:
        lines += ['', LEGEND]
    sizes = dict.fromkeys((row['case'], row['size']) for row in rows)
    for case, size in sizes:
        chosen = [r for r in rows if (r['case'], r['size']) == (case, size)]
        lines += ['', f'## {case}: {size}', '', table(chosen)]
    plots = write_plots(rows, output)
    lines += ['', *(f'![{path.stem}]({path.name})' for path in plots)]
    content = dict(
        facts=about,
        parts=[dataclasses.asdict(part) for part in parts],
        tests=tests,
        benchmarks=rows,
    )
    for name, text in (
        ('report.json', json.dumps(content, indent=1)),
        ('report.md', '\n'.join(lines) + '\n'),
    ):
        new = output / f'{name}.new'
        new.write_text(text, encoding='utf-8')
        os.replace(new, output / name)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run everything; see above for the exit code."""
    args = parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    stop = Stop()
    stop.listen()
    write_report(args.parts, output)
    code = run_parts(args.parts, output, args.minutes, stop)
    if stop.code:
        print('stopped; the report holds what was found until now')
    archive = shutil.make_archive(
        str(output), 'zip', output.parent, output.name
    )
    print(
        f'\n{output / "report.md"}\nTo report it, open an issue of this '
        f'project with the card in its title and attach\n{archive}'
    )
    return code


if __name__ == '__main__':
    sys.exit(main())
