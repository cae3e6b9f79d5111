"""Adapters against other ways to adapt a model: accuracy, size, time, memory.

Classification of solar cells with a ViT-S/14, detection of blood cells with a
MobileNetV2; docs/en/benchmarks/rep_adapter.md says how to get data and
weights, and what came out. Finished runs are not repeated, so the same
command goes on where it was interrupted.

Example:
    python tools/benchmarks/rep_adapter.py train
    python tools/benchmarks/rep_adapter.py detect
    python tools/benchmarks/rep_adapter.py measure
    python tools/benchmarks/rep_adapter.py latency
    python tools/benchmarks/rep_adapter.py report
    python tools/benchmarks/rep_adapter.py search --config configs/\
rep_adapter/vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

TOOLS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOOLS.parent), str(TOOLS / 'analysis_tools')]

import bccd_runs  # noqa: E402
import rep_adapter_report as reports  # noqa: E402
from bccd_report import plot_curves, read_run  # noqa: E402
from plot_training import read_history  # noqa: E402
from rep_adapter_measure import measure, measure_latency  # noqa: E402
from rep_adapter_runs import (  # noqa: E402
    ARMS,
    CONFIG,
    RESULT,
    ROOT,
    Arm,
    BenchmarkError,
    run_all,
    scaled_arms,
)

logger = logging.getLogger('rep_adapter')

BLOOD = 'configs/rep_adapter/lors-adamixer_mobilenetv2-{}_49-queries_bccd.py'
DETECTORS = {
    'frozen': BLOOD.format('frozen'),
    'full': BLOOD.format('full'),
    'rep-adapter': BLOOD.format('rep-adapter'),
}
NAMES = {'full': 'full tuning', 'rep-adapter': 'RepAdapter'}
SCALES = (0.1, 0.5, 1.0, 5.0, 10.0)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        '--work-dir', default='work_dirs/rep_adapter', type=Path,
        help='folder of all runs and results (default: %(default)s)',
    )  # fmt: skip
    seeds = argparse.ArgumentParser(add_help=False)
    seeds.add_argument(
        '--seeds', nargs='+', type=int, default=[0, 1, 2],
        help='a run for each (default: 0 1 2)',
    )  # fmt: skip
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        metavar='KEY=VALUE', help='override entries of all configs',
    )  # fmt: skip
    rounds = argparse.ArgumentParser(add_help=False)
    rounds.add_argument(
        '--rounds', type=int, default=15,
        help='timed calls of each model (default: %(default)s)',
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        description='Compare adapters with other ways to adapt a model'
    )
    steps = parser.add_subparsers(dest='step', required=True)
    names = [arm.folder for arm in ARMS]
    train = steps.add_parser(
        'train', parents=[common, seeds, options],
        help='train and test on solar cells',
    )  # fmt: skip
    train.add_argument(
        '--arms', nargs='+', choices=names, default=names, metavar='ARM',
        help=f'of {", ".join(names)} (default: all)',
    )  # fmt: skip
    search = steps.add_parser(
        'search', parents=[common, options],
        help='search the scale of the adapters on the validation split',
    )  # fmt: skip
    search.add_argument(
        '--config', default=CONFIG.format('rep-adapter'),
        help='config with RepAdapterHook (default: %(default)s)',
    )  # fmt: skip
    search.add_argument(
        '--scales', nargs='+', type=float, default=SCALES,
        help='default: 0.1 0.5 1 5 10',
    )  # fmt: skip
    search.add_argument('--seed', type=int, default=0, help='default: 0')
    detect = steps.add_parser(
        'detect', parents=[common, seeds], help='train on blood cells'
    )
    detect.add_argument(
        '--jobs', type=int, default=1, help='trainings at a time (default: 1)'
    )
    steps.add_parser(
        'measure', parents=[common, rounds, options],
        help='time and memory of training, all models in turns',
    )  # fmt: skip
    latency = steps.add_parser(
        'latency', parents=[common, rounds, options],
        help='plain, adapted and merged model in turns',
    )  # fmt: skip
    latency.add_argument(
        '--size', type=int, default=112,
        help='sides of the images (default: %(default)s)',
    )  # fmt: skip
    latency.add_argument(
        '--batches', nargs='+', type=int, default=[1, 4, 16],
        help='default: 1 4 16',
    )  # fmt: skip
    steps.add_parser('report', parents=[common], help='write tables and plots')
    args = parser.parse_args(argv)
    if getattr(args, 'rounds', 1) < 1:
        parser.error('--rounds must be at least 1')
    return args


def detection_runs(work_dir: Path, seeds: Sequence[int]) -> list:
    """Trainings on blood cells, seed by seed.

    Args:
        work_dir (Path): Folder of all runs.
        seeds (Sequence[int]): A run for each.

    Returns:
        list[bccd_runs.Run]: The runs.
    """
    folder = work_dir.resolve() / 'bccd'
    return [
        bccd_runs.Run(name, config, seed, folder / f'{name}_seed{seed}')
        for seed in dict.fromkeys(seeds)
        for name, config in DETECTORS.items()
    ]


def detect(args: argparse.Namespace) -> None:
    """Train the detectors.

    Args:
        args (argparse.Namespace): The options.
    """
    recipe = bccd_runs.Recipe()
    config = recipe.load(ROOT / DETECTORS['frozen'])
    bccd_runs.check_data(config)
    bccd_runs.prepare_backbone(config)
    runs = detection_runs(args.work_dir, args.seeds)
    bccd_runs.train_all(runs, recipe, args.jobs)


def search(args: argparse.Namespace) -> None:
    """Train with every scale and say which is best on the validation split.

    Args:
        args (argparse.Namespace): The options.
    """
    folder = args.work_dir / f'search_{Path(args.config).stem}'
    arms = scaled_arms(args.config, args.scales)
    runs = run_all(arms, [args.seed], folder, args.cfg_options, test=False)
    for arm, run in zip(arms, runs):
        logger.info('%s: val %.2f', arm.name, run['val'])
    best = max(runs, key=lambda run: run['val'])
    logger.info('best on the validation split: %s', best['arm'])


def load_all(options: dict) -> tuple[dict[str, Config], dict[str, Config]]:
    """Load the configs of both tasks.

    Args:
        options (dict): Entries of all configs to override.

    Returns:
        tuple[dict]: Configs of classifiers and of detectors.
    """
    recipe = bccd_runs.Recipe()
    blood = {
        NAMES.get(name, name): recipe.load(ROOT / path)
        for name, path in DETECTORS.items()
    }
    for cfg in blood.values():
        cfg.merge_from_dict(options)
        start = cfg.model.backbone.init_cfg
        if start:
            start.checkpoint = str(ROOT / start.checkpoint)
    return {arm.name: arm.load(options) for arm in ARMS}, blood


def write(content: dict, path: Path) -> None:
    """Write results with what they were made by.

    Args:
        content (dict): Results.
        path (Path): File to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(torch=torch.__version__, **content)
    path.write_text(json.dumps(content, indent=1) + '\n')
    logger.info('results: %s', path)


def report(work_dir: Path) -> None:
    """Write tables, plots and numbers of everything that is there.

    Args:
        work_dir (Path): Folder of all runs.
    """
    out = work_dir / 'report'
    out.mkdir(parents=True, exist_ok=True)
    measured = dict(cells={}, blood={})
    if (work_dir / 'measured.json').is_file():
        measured |= json.loads((work_dir / 'measured.json').read_text())
    order = [arm.name for arm in ARMS]
    runs = [
        json.loads(path.read_text())
        for path in sorted(work_dir.glob(f'*_seed*/{RESULT}'))
    ]
    runs.sort(key=lambda run: (order.index(run['arm']), run['seed']))
    parts = []
    if runs:
        groups = reports.group_runs(runs)
        keys = dict(validation='val', test='test')
        parts.append(reports.accuracy_table(groups, measured['cells'], keys))
        columns = ['seed', 'val', 'test', 'best', 'trained',
                   'checkpoint_bytes', 'minutes']  # fmt: skip
        reports.write_csv(groups, columns, out / 'solar_cells.csv')
        reports.plot_accuracy(
            groups, measured['cells'], 'test',
            ('trained parameters (million)', 'test accuracy (%)',
             'Solar cells: each seed, mean and standard deviation'),
            out / 'solar_cells.png',
        )  # fmt: skip
    parts += detection_report(work_dir, measured['blood'], out)
    for task, baseline in (('cells', 'full tuning'), ('blood', 'full tuning')):
        if measured[task]:
            parts.append(reports.cost_table(measured[task], baseline))
    if (work_dir / 'latency.json').is_file():
        latency = json.loads((work_dir / 'latency.json').read_text())
        parts.append(reports.latency_table(latency))
        reports.plot_latency(latency, out / 'latency.png')
    if not parts:
        raise BenchmarkError(f'nothing was run in {work_dir} yet')
    (out / 'tables.md').write_text('\n'.join(parts))
    logger.info('%s', '\n'.join(parts))
    logger.info('results: %s', out)


def detection_report(work_dir: Path, sizes: dict, out: Path) -> list[str]:
    """Write table, plots and numbers of the detectors.

    Args:
        work_dir (Path): Folder of all runs.
        sizes (dict): What was measured of each way.
        out (Path): Folder to write to.

    Returns:
        list[str]: The table, if any run is finished.
    """
    seeds = range(100)
    runs = [
        run
        for run in detection_runs(work_dir, seeds)
        if (run.work_dir / bccd_runs.FINISHED).is_file()
    ]
    if not runs:
        return []
    runs.sort(key=lambda run: (list(DETECTORS).index(run.model), run.seed))
    results, losses = [], {}
    for run in runs:
        name = NAMES.get(run.model, run.model)
        results.append(dict(read_run(run), arm=name))
        history = read_history(run.work_dir).train
        losses.setdefault(name, []).append(
            [(record['step'], record['loss']) for record in history]
        )
    groups = reports.group_runs(results)
    columns = ['seed', 'AP', 'AP50', 'AP75', 'minutes', 'final_loss']
    reports.write_csv(groups, columns, out / 'blood_cells.csv')
    models = {name: dict(runs=group) for name, group in groups.items()}
    plot_curves(models, losses, out / 'blood_cells_curves.png')
    if sizes:
        reports.plot_accuracy(
            groups, sizes, 'AP',
            ('trained parameters (million)', 'COCO box AP (%)',
             'Blood cells: each seed, mean and standard deviation'),
            out / 'blood_cells.png',
        )  # fmt: skip
    keys = dict(AP50='AP50', AP75='AP75', AP='AP')
    return [reports.accuracy_table(groups, sizes, keys)]


def benchmark(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    if args.step == 'train':
        arms = [arm for arm in ARMS if arm.folder in args.arms]
        run_all(arms, args.seeds, args.work_dir, args.cfg_options)
    elif args.step == 'search':
        search(args)
    elif args.step == 'detect':
        detect(args)
    elif args.step == 'measure':
        cells, blood = load_all(args.cfg_options)
        content = dict(
            threads=torch.get_num_threads(),
            cells=measure(cells, args.rounds),
            blood=measure(blood, args.rounds),
        )
        write(content, args.work_dir / 'measured.json')
    elif args.step == 'latency':
        plain, adapted = (
            Arm(name, CONFIG.format(name)).load(args.cfg_options)
            for name in ('full', 'rep-adapter')
        )
        content = measure_latency(
            plain, adapted, args.size, args.batches, args.rounds
        )
        write(content, args.work_dir / 'latency.json')
    else:
        report(args.work_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING, format='%(asctime)s %(message)s',
        datefmt='%H:%M',
    )  # fmt: skip
    for name in ('rep_adapter', 'bccd'):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        benchmark(args)
    except (BenchmarkError, bccd_runs.BenchmarkError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
