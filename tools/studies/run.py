"""Train the runs of a study of accuracy and report them.

    python tools/studies/run.py --list
    python tools/studies/run.py bccd --jobs 2

Each run is a process of its own with one thread (OMP_NUM_THREADS changes
that), started by tools/train.py. Finished runs are not repeated and
interrupted ones are resumed, so the same command goes on where it stopped.
Tables, plot, CSV and JSON are written to the folder "report" of the working
directory.

Exit code 1 means that runs failed, 2 a mistake in the command, the study or
the data, 75 that a signal stopped the study: start it again.
"""

import argparse
import fnmatch
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

from recipe import QUICK_IMAGES, count_parameters, make_options, make_paths
from report import write_report
from study import ROOT, Run, Study, StudyError
from training import EXIT_STOPPED, Job, StoppedError, run_jobs

HERE = Path(__file__).resolve().parent
STUDIES = (
    'bccd',
    'adamixer_tables',
    'lors_tables',
    'lors_vit',
    'rep_adapter',
    'rep_adapter_scale',
    'tuning',
    'vtab',
    'parameternet',
    'llama_moe',
)
EXIT_FAILED, EXIT_USER_ERROR = 1, 2


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = f'{", ".join(STUDIES)}, or a Python file that defines STUDY'
    add = parser.add_argument
    # fmt: off
    add('study', nargs='?', help=studies)
    add('--list', action='store_true', help='show studies and runs, and end')
    add('--runs', nargs='+', metavar='NAME',
        help="runs or patterns, 'cells/*' for example (default: all)")
    add('--seeds', nargs='+', type=int, metavar='N',
        help="a run for each (default: the study's)")
    add('--epochs', type=int, metavar='N', help="default: the configs'")
    add('--quick', action='store_true',
        help=f'prove the command: {QUICK_IMAGES} images, seed 0')
    add('--data', type=Path, default=ROOT / 'data', metavar='ROOT',
        help='folder of all data sets (default: data of the repository)')
    add('--config', type=Path, help='train this config in all runs instead')
    add('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
        help='override entries of all configs')
    add('--work-dir', type=Path, metavar='DIR',
        help='folder of all runs (default: work_dirs/studies/STUDY, or '
        'STUDY-quick)')
    add('--jobs', type=int, default=1, metavar='N',
        help='runs at a time (default: %(default)s)')
    add('--report-only', action='store_true',
        help='train nothing, report the runs that are finished')
    # fmt: on
    args = parser.parse_args(argv)
    if not args.study and not args.list:
        parser.error(f'name a study: {studies}')
    if args.jobs < 1 or (args.epochs or 1) < 1:
        parser.error('--jobs and --epochs are at least 1')
    return args


def load_study(name: str) -> Study:
    """Load a study by its name or from a Python file."""
    path = HERE / f'{name}.py' if name in STUDIES else Path(name)
    if path.suffix != '.py' or not path.is_file():
        raise StudyError(
            f'there is no study {name}: name one of {", ".join(STUDIES)} or '
            'a Python file that defines STUDY'
        )
    spec = importlib.util.spec_from_file_location(f'study_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, 'STUDY', None), Study):
        raise StudyError(f'{path} defines no STUDY')
    return module.STUDY


def list_studies(names: list[str]) -> None:
    """Print studies with their runs."""
    for name in names:
        study = load_study(name)
        print(f'{name}: {study.title} ({study.page})')
        for run in study.runs:
            words = [run.name, run.config]
            words += [f'{k}={v}' for k, v in run.options.items()]
            words += [f'(from {run.start})'] if run.start else []
            print('  ' + ' '.join(filter(None, words)))


def choose_runs(study: Study, patterns: list[str] | None) -> list[Run]:
    """Select runs by name or pattern, and those that they start from."""
    names = [run.name for run in study.runs]
    chosen = set(names if patterns is None else ())
    for pattern in patterns or ():
        found = fnmatch.filter(names, pattern)
        if not found:
            raise StudyError(
                f'the study has no run {pattern}, but {", ".join(names)}'
            )
        chosen.update(found)
    for run in reversed(study.runs):
        if run.name in chosen and run.start:
            chosen.add(run.start)
    return [run for run in study.runs if run.name in chosen]


def make_jobs(study: Study, args: argparse.Namespace) -> list[Job]:
    """Combine runs and seeds, seed by seed, so that all can be compared."""
    runs, options = choose_runs(study, args.runs), {}
    if study.command and (args.epochs or args.cfg_options or args.config):
        raise StudyError(
            f'{args.study} trains without configs: --config, --epochs and '
            '--cfg-options do not apply'
        )
    if args.config:
        config = str(args.config.resolve())
        runs = [replace(run, config=config) for run in runs]
    if not study.command:
        options = {
            run.name: make_options(
                run, args.epochs, args.quick, args.cfg_options
            )
            for run in runs
        }
    jobs = []
    seeds = args.seeds or ([0] if args.quick else study.seeds)
    for seed in dict.fromkeys(seeds):
        for run in runs:
            if study.command:
                recipe = study.command(run, seed, args.quick)
            else:
                recipe = ['tools/train.py', run.config, '--cfg-options']
                recipe += [f'randomness.seed={seed}', *options[run.name]]
            folder = args.work_dir / run.name / f'seed{seed}'
            jobs.append(Job(run, seed, folder, recipe))
    return jobs


def prepare(jobs: list[Job], study: Study, data: Path) -> None:
    """Check data and weights, and count the parameters of each model."""
    counts = {}
    for job in jobs:
        if study.command or job.result() is not None:
            continue
        words = job.recipe[3:]
        job.paths = make_paths(job.run, words, data, study.page)
        if job.run.name not in counts:
            words = words + job.paths
            counts[job.run.name] = count_parameters(
                job.run, words, study.parts
            )
        job.counts = counts[job.run.name]


def run_study(args: argparse.Namespace) -> int:
    """Train and report; return the exit code."""
    study = load_study(args.study)
    if args.work_dir is None:
        name = Path(args.study).stem + ('-quick' if args.quick else '')
        args.work_dir = ROOT / 'work_dirs' / 'studies' / name
    args.work_dir = args.work_dir.resolve()
    jobs, failed = make_jobs(study, args), []
    if not args.report_only:
        prepare(jobs, study, args.data.resolve())
        failed = run_jobs(jobs, study, args.jobs)
    results = [result for job in jobs if (result := job.result()) is not None]
    if results:
        out = args.work_dir / 'report'
        print(write_report(study, results, out))
        print(f'{len(results)} of {len(jobs)} runs are finished: {out}')
    elif args.report_only:
        raise StudyError(f'no run in {args.work_dir} is finished')
    for message in failed:
        sys.stderr.write(f'error: {message}\n')
    return EXIT_FAILED if failed else 0


def main(argv=None):
    """List, train or report; return the exit code."""
    args = parse_args(argv)
    try:
        if args.list:
            list_studies([args.study] if args.study else STUDIES)
            return 0
        return run_study(args)
    except StoppedError:
        sys.stderr.write('stopped; the same command goes on from here\n')
        return EXIT_STOPPED
    except (StudyError, OSError) as error:
        sys.stderr.write(f'error: {error}\n')
        return EXIT_USER_ERROR


if __name__ == '__main__':
    sys.exit(main())
