"""AdaMixer against LORS-AdaMixer on BCCD: accuracy, size, time, memory.

Trains every model with every seed, measures time and memory of all models in
turns, and writes table, plots and numbers. Finished runs are not repeated, so
the same command goes on where it was interrupted. All of it takes less than
an hour on two quiet cores.

Example:
    python tools/benchmarks/bccd.py --work-dir work_dirs/bccd --jobs 2

docs/en/benchmarks/bccd.md says how to get the data, and what came out.
"""

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mmdet
import torch

TOOLS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOOLS.parent), str(TOOLS / 'analysis_tools')]

from bccd_measure import measure  # noqa: E402
from bccd_report import (  # noqa: E402
    compare,
    make_cost_table,
    make_table,
    plot_ap,
    plot_curves,
    read_run,
    summarise,
    write_csv,
)
from bccd_runs import (  # noqa: E402
    FINISHED,
    ROOT,
    BenchmarkError,
    Recipe,
    Run,
    check_data,
    prepare_backbone,
    train_all,
)
from plot_training import read_history  # noqa: E402

logger = logging.getLogger('bccd')

MODELS = {
    'AdaMixer G4 P16': 'configs/adamixer/'
    'adamixer_mobilenetv2-g4-p16_49-queries_bccd.py',
    'AdaMixer G2 P32': 'configs/adamixer/'
    'adamixer_mobilenetv2-g2-p32_49-queries_bccd.py',
    'LORS G2 P32': 'configs/lors_adamixer/'
    'lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py',
    'shared only G2 P32': 'configs/lors_adamixer/'
    'lors-adamixer_mobilenetv2-g2-p32-shared-only_49-queries_bccd.py',
}
BASELINE = 'AdaMixer G2 P32'
RECIPE = 'recipe.json'
SPREAD = {
    True: 'within the spread',
    False: 'beyond the spread',
    None: 'one seed says nothing of the spread',
}


def short(name: str) -> str:
    """Name of a model for the command line and for folders.

    Args:
        name (str): A name of :data:`MODELS`.

    Returns:
        str: In lower case, without blanks.
    """
    return name.lower().replace(' ', '-')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    names = [short(name) for name in MODELS]
    parser = argparse.ArgumentParser(
        description='Train and measure AdaMixer and LORS-AdaMixer on BCCD'
    )
    parser.add_argument(
        '--work-dir',
        default='work_dirs/bccd',
        help='folder of all runs (default: %(default)s); the results are '
        'in its folder "report"',
    )
    parser.add_argument(
        '--models', nargs='+', choices=names, default=names, metavar='MODEL',
        help=f'of {", ".join(names)} (default: all)',
    )  # fmt: skip
    parser.add_argument(
        '--seeds', nargs='+', type=int, default=[0, 1, 2],
        help='a run for each (default: 0 1 2)',
    )  # fmt: skip
    parser.add_argument(
        '--max-epochs', type=int, help="length (default: the configs')"
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=min(2, os.cpu_count() or 1),
        help='trainings at a time, each with one thread (OMP_NUM_THREADS '
        'changes that) (default: %(default)s)',
    )
    parser.add_argument(
        '--rounds',
        type=int,
        default=30,
        help='timed iterations of each model, 0 for none (default: 30)',
    )
    parser.add_argument(
        '--data-root', help="folder of BCCD (default: the configs')"
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
        help='override entries of all configs',
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in ('jobs', 'max_epochs'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    if args.rounds < 0:
        parser.error('--rounds must not be negative')
    return args


def collect(
    runs: Sequence[Run], configs: dict[str, str], measured: dict
) -> dict:
    """Bring the results together.

    Args:
        runs (Sequence[Run]): All runs, finished.
        configs (dict[str, str]): Config of each model.
        measured (dict): See :func:`bccd_measure.measure`.

    Returns:
        dict[str, dict]: Results of each model.
    """
    models = {}
    for name, config in configs.items():
        mine = [run for run in runs if run.model == name]
        results = [read_run(run) for run in mine]
        peaks = [
            json.loads((run.work_dir / FINISHED).read_text())['peak_memory']
            for run in mine
        ]
        models[name] = dict(
            config=config,
            AP=summarise([result['AP'] for result in results]),
            AP50=summarise([result['AP50'] for result in results]),
            peak_memory=max(peaks),
            **measured[name],
            runs=results,
        )
    return models


def report(
    models: dict[str, dict], runs: Sequence[Run], recipe: Recipe, out: Path
) -> None:
    """Write numbers, table and plots.

    Args:
        models (dict[str, dict]): See :func:`collect`.
        runs (Sequence[Run]): All runs, finished.
        recipe (Recipe): What they have in common.
        out (Path): Folder to write to.
    """
    out.mkdir(parents=True, exist_ok=True)
    comparisons = {
        name: compare(model['runs'], models[BASELINE]['runs'])
        for name, model in models.items()
        if BASELINE in models and name != BASELINE
    }
    content = dict(
        max_epochs=recipe.max_epochs,
        options=recipe.options,
        torch=torch.__version__,
        mmdet=mmdet.__version__,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        against_baseline=comparisons,
        models=models,
    )
    text = json.dumps(content, indent=1) + '\n'
    (out / 'results.json').write_text(text)
    write_csv(models, out / 'results.csv')
    tables = [f(models, BASELINE) for f in (make_table, make_cost_table)]
    table = '\n'.join(tables)
    (out / 'table.md').write_text(table)
    plot_ap(models, out / 'bccd_ap.png')
    losses = {
        name: [
            [(r['step'], r['loss']) for r in read_history(run.work_dir).train]
            for run in runs
            if run.model == name
        ]
        for name in models
    }
    plot_curves(models, losses, out / 'bccd_curves.png')
    logger.info('%s', table)
    for name, values in comparisons.items():
        logger.info(
            '%s: AP %+.2f against %s, standard error %.2f: %s',
            name,
            values['difference'],
            BASELINE,
            values['spread'],
            SPREAD[values['within']],
        )
    logger.info('results: %s', out)


def benchmark(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    work_dir = Path(args.work_dir).resolve()
    configs = {k: v for k, v in MODELS.items() if short(k) in args.models}
    data_root = args.data_root and str(Path(args.data_root).resolve())
    recipe = Recipe(args.max_epochs, data_root, args.cfg_options)
    # Seed by seed, so that what is finished early can be compared.
    runs = [
        Run(name, config, seed, work_dir / f'{short(name)}_seed{seed}')
        for seed in dict.fromkeys(args.seeds)
        for name, config in configs.items()
    ]
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / RECIPE).write_text(json.dumps(asdict(recipe)))
    loaded = {name: recipe.load(ROOT / p) for name, p in configs.items()}
    for config in loaded.values():
        check_data(config)
        prepare_backbone(config)
    train_all(runs, recipe, args.jobs)
    measured = measure(loaded, args.rounds)
    models = collect(runs, configs, measured)
    report(models, runs, recipe, work_dir / 'report')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format='%(asctime)s %(message)s', datefmt='%H:%M'
    )
    try:
        benchmark(args)
    except (BenchmarkError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
