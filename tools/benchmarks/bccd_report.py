"""Table and plots of the BCCD benchmark."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from bccd_runs import BenchmarkError, Run  # noqa: E402
from plot_training import (  # noqa: E402
    COLORS,
    GREY,
    History,
    PlotError,
    read_history,
)

METRICS = dict(
    AP='bbox_mAP',
    AP50='bbox_mAP_50',
    AP75='bbox_mAP_75',
    AP_s='bbox_mAP_s',
    AP_m='bbox_mAP_m',
    AP_l='bbox_mAP_l',
)
MEGA = 1e6


def read_metrics(record: Mapping) -> dict:
    """Read the metrics of one evaluation.

    Args:
        record (dict): Record of the log.

    Returns:
        dict[str, float]: AP and its kind, in percent.
    """
    found = {key.split('/')[-1]: value for key, value in record.items()}
    return {
        label: round(100 * found[key], 1)
        for label, key in METRICS.items()
        if key in found
    }


def read_run(run: Run) -> dict:
    """Read what a finished run logged.

    Args:
        run (Run): The run.

    Returns:
        dict: ``seed``, the metrics of the last evaluation, ``minutes`` of
        training, and ``curve``, the metrics of all evaluations.
    """
    try:
        history: History = read_history(run.work_dir)
    except PlotError as error:
        raise BenchmarkError(f'{run.name}: {error}') from error
    curve = [
        dict(step=record['step'], **read_metrics(record))
        for record in history.val
    ]
    if not curve or 'AP' not in curve[-1]:
        raise BenchmarkError(f'{run.name} was not evaluated, see {run.log}')
    last = {k: v for k, v in curve[-1].items() if k != 'step'}
    return dict(
        seed=run.seed,
        **last,
        minutes=round(history.train[-1]['minutes'], 1),
        final_loss=round(history.train[-1]['loss'], 3),
        curve=curve,
    )


def summarise(values: Sequence[float]) -> dict:
    """Mean and spread of a value over the seeds.

    Args:
        values (Sequence[float]): One a seed.

    Returns:
        dict: ``mean`` and ``std``, the sample's, 0 of a single value.
    """
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return dict(mean=round(statistics.fmean(values), 2), std=round(std, 2))


def compare(runs: Sequence[dict], other: Sequence[dict]) -> dict:
    """Compare the AP of two models.

    Args:
        runs (Sequence[dict]): Runs of a model.
        other (Sequence[dict]): Runs of the other one.

    Returns:
        dict: ``difference`` of the means, ``spread``, its standard error
        from the spreads of both, and ``within``: whether the difference is
        at most twice that, None where a single seed has no spread.
    """
    ours, theirs = ([run['AP'] for run in r] for r in (runs, other))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    spread = math.hypot(
        *(
            summarise(values)['std'] / math.sqrt(len(values))
            for values in (ours, theirs)
        )
    )
    return dict(
        difference=round(difference, 2),
        spread=round(spread, 2),
        within=(
            abs(difference) <= 2 * spread
            if min(len(ours), len(theirs)) > 1
            else None
        ),
    )


def make_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in markdown.

    Args:
        header (Sequence[str]): Names of the columns.
        rows (Sequence[Sequence[str]]): Cells.

    Returns:
        str: The table.
    """
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def make_table(models: Mapping[str, dict], baseline: str) -> str:
    """Write accuracy and size as a table in markdown.

    Args:
        models (dict[str, dict]): Results of each model.
        baseline (str): Model that the size is relative to.

    Returns:
        str: The table.
    """
    header = [
        'model', 'decoder', 'of the baseline', 'mixing in it', 'AP', 'AP50',
        'AP of each seed',
    ]  # fmt: skip
    rows = []
    for name, model in models.items():
        size = model['decoder_params']
        share = '-'
        if baseline in models:
            share = 100 * size / models[baseline]['decoder_params']
            share = f'{share:.0f} %'
        scores = [
            f'{model[key]["mean"]:.1f} ± {model[key]["std"]:.1f}'
            for key in ('AP', 'AP50')
        ]
        rows.append(
            [
                name,
                f'{size / MEGA:.3f} M',
                share,
                f'{100 * model["mixing_params"] / size:.0f} %',
                *scores,
                ', '.join(f'{run["AP"]:.1f}' for run in model['runs']),
            ]
        )
    return make_rows(header, rows)


def make_cost_table(models: Mapping[str, dict], baseline: str) -> str:
    """Write time and memory as a table in markdown.

    Args:
        models (dict[str, dict]): Results of each model.
        baseline (str): Model that times are relative to.

    Returns:
        str: The table.
    """
    header = [
        'model', 'training iteration', 'of the baseline', 'detection',
        'of the baseline', 'state', 'kept for backward',
        'peak of the process',
    ]  # fmt: skip
    rows = []
    for name, model in models.items():
        row = [name]
        for key in ('train_seconds', 'predict_seconds'):
            if key not in model:
                row += ['-', '-']
                continue
            seconds, share = model[key]['median'], '-'
            if baseline in models:
                share = seconds / models[baseline][key]['median']
                share = f'{100 * share:.0f} %'
            row += [f'{1000 * seconds:.0f} ms', share]
        sizes = [
            *(model['memory'][key] for key in ('state', 'saved')),
            model['peak_memory'],
        ]
        rows.append([*row, *(f'{size / MEGA:.0f} MB' for size in sizes)])
    return make_rows(header, rows)


def write_csv(models: Mapping[str, dict], path: Path) -> None:
    """Write one line a run.

    Args:
        models (dict[str, dict]): Results of each model.
        path (Path): File to write.
    """
    names = ['seed', *METRICS, 'minutes', 'final_loss']
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['model', *names, 'decoder_params', 'params'])
        for name, model in models.items():
            for run in model['runs']:
                values = [run.get(key, '') for key in names]
                sizes = [model['decoder_params'], model['params']]
                writer.writerow([name, *values, *sizes])


def plot_ap(models: Mapping[str, dict], path: Path) -> None:
    """Draw AP against the size of the decoder, a dot a seed.

    Args:
        models (dict[str, dict]): Results of each model.
        path (Path): Picture to write.
    """
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 4.4), layout='constrained'
    )
    for axes, metric in zip(panels, ('AP', 'AP50')):
        for i, (name, model) in enumerate(models.items()):
            values = [run[metric] for run in model['runs']]
            size = [model['decoder_params'] / MEGA] * len(values)
            mean, std = model[metric]['mean'], model[metric]['std']
            color = COLORS[i]
            axes.errorbar(
                size[:1], [mean], [std], fmt='_', color=color, ms=22, capsize=5
            )
            axes.plot(size, values, 'o', color=color, alpha=0.6, label=name)
        axes.set_xlabel('parameters of the decoder (million)')
        axes.set_ylabel(f'COCO box {metric} (%)')
        axes.set_xlim(left=0)
        axes.grid(color='#dddddd', linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle('BCCD: each seed, mean and standard deviation')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(
    models: Mapping[str, dict], losses: Mapping[str, list], path: Path
) -> None:
    """Draw AP and loss over the training, a line a seed.

    Args:
        models (dict[str, dict]): Results of each model.
        losses (dict[str, list]): For each model and seed the pairs of
            iteration and loss.
        path (Path): Picture to write.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), layout='constrained'
    )
    for i, (name, model) in enumerate(models.items()):
        for j, pairs in enumerate(losses[name]):
            label = None if j else name
            left.plot(*zip(*pairs), color=COLORS[i], lw=0.9, alpha=0.7)
            curve = model['runs'][j]['curve']
            right.plot(
                [point['step'] for point in curve],
                [point['AP'] for point in curve],
                'o-',
                color=COLORS[i],
                alpha=0.7,
                ms=3,
                label=label,
            )
    left.set_ylabel('training loss (stages added up)')
    right.set_ylabel('COCO box AP (%)')
    for axes in (left, right):
        axes.set_xlabel('iteration')
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(color='#dddddd', linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
        axes.tick_params(colors=GREY)
    right.legend(frameon=False, loc='lower right')
    figure.suptitle('BCCD: learning curves, a line a seed')
    figure.savefig(path, dpi=120)
    plt.close(figure)
