"""GhostNet, ParameterNet and RepConv: what does a larger set bring?

The question of ParameterNet in small. Networks of the same multiply-adds and
different numbers of parameters learn a small set (solar cells, ELPV) from
scratch, and after they have learned a large one (Fashion-MNIST). Writes a
table, a plot and numbers. Finished runs are not repeated, so the same command
goes on where it was interrupted.

Example:
    python tools/benchmarks/parameternet_evidence.py \\
        --large /usr/share/datasets/fashion-mnist --small data/elpv

docs/en/benchmarks/parameternet_evidence.md says how to get the data, and what
came out.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools' / 'analysis_tools')]

from parameternet_evidence_report import write_report  # noqa: E402
from parameternet_evidence_runs import (  # noqa: E402
    EvidenceError,
    Recipe,
    Run,
    load_fashion_mnist,
    load_lists,
)

CONFIG = 'configs/_base_/models/parameternet_tiny.py'
ROUTINGS = dict(sigmoid='sigmoid_linear', softmax='softmax_mlp')
MODELS = {
    'GhostNet': dict(num_experts=1),
    'RepConv': dict(conv='rep'),
    **{
        f'ParameterNet-{experts} {name}': dict(
            num_experts=experts, routing=routing
        )
        for name, routing in ROUTINGS.items()
        for experts in (2, 4, 8)
    },
}
logger = logging.getLogger('evidence')


def short(name: str) -> str:
    """Name of a model for the command line and for files."""
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
        description='Train GhostNet, ParameterNet and RepConv, small, on '
        'Fashion-MNIST and on solar cells'
    )
    parser.add_argument(
        '--large',
        default='/usr/share/datasets/fashion-mnist',
        help='folder of Fashion-MNIST (default: %(default)s)',
    )
    parser.add_argument(
        '--small',
        default='data/elpv',
        help='folder of the solar cells (default: %(default)s)',
    )
    parser.add_argument(
        '--lists',
        nargs=2,
        default=['defect_train.txt', 'defect_test.txt'],
        metavar=('TRAIN', 'TEST'),
        help='lists in its folder "annotations" (default: %(default)s)',
    )
    parser.add_argument(
        '--work-dir',
        default='work_dirs/parameternet_evidence',
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
        '--report-only',
        action='store_true',
        help='train nothing, report the runs that are finished',
    )
    for field in fields(Recipe):
        parser.add_argument(
            f'--{field.name.replace("_", "-")}',
            type=field.type,
            default=field.default,
            help='of the recipe (default: %(default)s)',
        )
    return parser.parse_args(argv)


def run_all(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    config = Config.fromfile(ROOT / CONFIG).model
    # Seed by seed, so that what is finished early can be compared.
    runs = [
        Run(name, options, seed, work_dir / f'{short(name)}_seed{seed}.json')
        for seed in dict.fromkeys(args.seeds)
        for name, options in MODELS.items()
        if short(name) in args.models
    ]
    waiting = [run for run in runs if run.results(recipe) is None]
    if waiting and not args.report_only:
        torch.set_num_threads(1)
        large = load_fashion_mnist(Path(args.large), recipe.large_images)
        small = load_lists(Path(args.small), *args.lists, recipe.size)
        for run in waiting:
            run.train(config, large, small, recipe)
    results = [run.results(recipe) for run in runs]
    results = [result for result in results if result is not None]
    if not results:
        raise EvidenceError(f'no run in {work_dir} is finished')
    write_report(results, MODELS, config, recipe, work_dir / 'report')
    logger.info('results: %s', work_dir / 'report')


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
        run_all(args)
    except (EvidenceError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
