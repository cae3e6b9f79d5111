"""Report a study: means and spreads over seeds, paired differences, a plot."""

import csv
import json
import math
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib
from scipy.stats import t as student

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

COUNTS = ('iteration_seconds', 'peak_memory')


def summarise(values: Sequence[float]) -> dict:
    """Compute mean and sample standard deviation.

    Args:
        values (Sequence[float]): One per seed.

    Returns:
        dict: ``mean``, ``n`` and ``std``, None of a single value.
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return dict(mean=statistics.fmean(values), std=std, n=len(values))


def compare(ours: dict[int, float], theirs: dict[int, float]) -> dict | None:
    """Compare two runs seed by seed.

    Args:
        ours (dict[int, float]): Values of a run by seed.
        theirs (dict[int, float]): Values of the run to subtract.

    Returns:
        dict, optional: ``mean``, ``std`` and ``n`` of the differences of the
        seeds that both have; ``interval``, half the width of the mean's 95 %
        confidence interval (Student's t); ``within``, whether 0 lies in it.
        The last two are None of a single seed. None if no seed is common.
    """
    differences = [ours[s] - theirs[s] for s in ours if s in theirs]
    if not differences:
        return None
    result = dict(summarise(differences), interval=None, within=None)
    if result['n'] > 1:
        error = result['std'] / math.sqrt(result['n'])
        result['interval'] = float(student.ppf(0.975, result['n'] - 1)) * error
        result['within'] = abs(result['mean']) <= result['interval']
    return result


def summary_text(value: dict, digits: int, sign: str = '') -> str:
    """Format mean and standard deviation as text."""
    text = f'{value["mean"]:{sign}.{digits}f}'
    if value['std'] is not None:
        text += f' ± {value["std"]:.{digits}f}'
    return text


def collect(study, results: Sequence[dict]) -> dict[str, dict]:
    """Bring the seeds of each run together.

    Args:
        study (Study): The study.
        results (Sequence[dict]): Results of the finished runs.

    Returns:
        dict[str, dict]: For each run of the study that has results, in the
        order of the study: ``group``, ``results``, ``counts`` of parameters,
        ``values`` of each metric by seed and their ``summary``, and
        ``differences`` to the run that it is compared with.
    """
    runs = {}
    for run in study.runs:
        mine = [result for result in results if result['run'] == run.name]
        if not mine:
            continue
        values = {
            label: {r['seed']: r['values'][label] for r in mine}
            for label in study.metrics
            if all(label in r['values'] for r in mine)
        }
        labels = ('parameters', 'trained', *study.parts)
        runs[run.name] = dict(
            group=run.group,
            against=run.against,
            counts={k: mine[0][k] for k in labels if k in mine[0]},
            values=values,
            summary={k: summarise([*v.values()]) for k, v in values.items()},
            results=mine,
        )
    for run in runs.values():
        theirs = runs.get(run['against'], dict(values={}))['values']
        found = {
            label: compare(values, theirs[label])
            for label, values in run['values'].items()
            if label in theirs
        }
        run['differences'] = {k: v for k, v in found.items() if v}
    return runs


def groups_of(runs: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Split the runs by their groups."""
    groups = {}
    for name, run in runs.items():
        groups.setdefault(run['group'], {})[name] = run
    return groups


def make_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def make_table(runs: dict[str, dict], digits: int) -> str:
    """Format sizes and metrics of a group of runs as a table in Markdown."""
    counts = list(dict.fromkeys(k for r in runs.values() for k in r['counts']))
    labels = list(dict.fromkeys(k for r in runs.values() for k in r['values']))
    rows = []
    for name, run in runs.items():
        row = [name]
        for key in counts:
            count = run['counts'].get(key)
            row.append('-' if count is None else f'{count / 1e6:.3f} M')
        for label in labels:
            value = run['summary'].get(label)
            row.append('-' if value is None else summary_text(value, digits))
        first = run['values'].get(labels[0], {})
        row.append(', '.join(f'{v:.{digits}f}' for v in first.values()))
        row += [
            '-' if value is None else f'{value:{form}}'
            for value, form in (
                (median_of(run, 'iteration_seconds', 1e3), '.0f'),
                (median_of(run, 'peak_memory', 1e-6), '.0f'),
            )
        ]
        rows.append(row)
    header = ['run', *counts, *labels, f'{labels[0]} of each seed']
    header += ['iteration (ms)', 'peak memory (MB)']
    return make_rows(header, rows)


def median_of(run: dict, key: str, factor: float) -> float | None:
    """Median over the seeds of what was measured beside the metrics."""
    found = [result.get(key) for result in run['results']]
    found = [value for value in found if value is not None]
    return factor * statistics.median(found) if found else None


def make_difference_table(runs: dict[str, dict], digits: int) -> str:
    """Format the paired differences of a group as a table in Markdown."""
    verdicts = {
        True: 'within the 95 % interval',
        False: 'beyond the 95 % interval',
        None: 'unknown spread',
    }
    labels = list(
        dict.fromkeys(k for r in runs.values() for k in r['differences'])
    )
    rows = []
    for name, run in runs.items():
        found = run['differences']
        if found:
            first = next(iter(found.values()))
            cells = [
                summary_text(found[k], digits, '+') if k in found else '-'
                for k in labels
            ]
            verdict = verdicts[first['within']]
            rows.append(
                [name, run['against'], *cells, str(first['n']), verdict]
            )
    if not rows:
        return ''
    header = ['run', 'minus', *labels, 'seeds', f'{labels[0]} is']
    return make_rows(header, rows)


def write_csv(runs: dict[str, dict], path: Path) -> None:
    """Write a line per run and seed."""
    keys = {
        kind: list(dict.fromkeys(k for r in runs.values() for k in r[kind]))
        for kind in ('values', 'counts')
    }
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        names = [*keys['values'], *keys['counts'], *COUNTS]
        writer.writerow(['run', 'seed', *names])
        for name, run in runs.items():
            for result in run['results']:
                values = [result['values'].get(k, '') for k in keys['values']]
                counts = [
                    result.get(k, '') for k in (*keys['counts'], *COUNTS)
                ]
                writer.writerow([name, result['seed'], *values, *counts])


def plot(study, runs: dict[str, dict], path: Path) -> None:
    """Draw mean and spread of each run, and a curve per run and seed.

    Args:
        study (Study): The study.
        runs (dict[str, dict]): See :func:`collect`.
        path (Path): Picture to write.
    """
    groups = groups_of(runs)
    heights = [1.6 + 0.3 * max(len(group), 5) for group in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        2,
        figsize=(12, sum(heights)),
        height_ratios=heights,
        layout='constrained',
        squeeze=False,
    )
    for (left, right), group in zip(panels, groups.values()):
        colors = plt.get_cmap('tab10' if len(group) <= 10 else 'tab20').colors
        label = next(iter(next(iter(group.values()))['values']))
        for i, (name, run) in enumerate(group.items()):
            color = colors[i % len(colors)]
            values = [*run['values'].get(label, {}).values()]
            if values:
                value = run['summary'][label]
                left.errorbar(
                    value['mean'],
                    i,
                    xerr=value['std'],
                    fmt='|',
                    ms=14,
                    color=color,
                    capsize=4,
                )
                left.plot(values, [i] * len(values), 'o', color=color, ms=4)
            for j, result in enumerate(run['results']):
                if result['curve']:
                    right.plot(
                        *zip(*result['curve']),
                        'o-',
                        color=color,
                        ms=3,
                        lw=1,
                        alpha=0.7,
                        label=None if j else name,
                    )
        left.set_yticks(range(len(group)), list(group))
        left.set_ylim(len(group) - 0.5, -0.5)
        left.set_xlabel(f'{label}: seeds, mean, standard deviation')
        curve = next(
            (
                k
                for k, (key, _) in study.metrics.items()
                if key.startswith('val/')
                and any(k in run['values'] for run in group.values())
            ),
            '',
        )
        right.set_xlabel('epoch or iteration of the evaluation')
        right.set_ylabel(f'{curve} while training')
        for axes in (left, right):
            axes.grid(color='#dddddd', linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(study.title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(study, results: Sequence[dict], out: Path) -> str:
    """Write ``table.md``, ``results.csv``, ``results.json``, ``plot.png``.

    Args:
        study (Study): The study.
        results (Sequence[dict]): Results of the finished runs.
        out (Path): Folder to write to.

    Returns:
        str: The tables.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = collect(study, results)
    content = dict(
        title=study.title,
        torch=version('torch'),
        machine=platform.machine(),
        runs=runs,
    )
    (out / 'results.json').write_text(json.dumps(content, indent=1) + '\n')
    write_csv(runs, out / 'results.csv')
    tables = [
        make(group, study.digits)
        for group in groups_of(runs).values()
        for make in (make_table, make_difference_table)
    ]
    if study.summary:
        tables.insert(0, study.summary(runs))
    text = '\n'.join(filter(None, tables))
    (out / 'table.md').write_text(text)
    plot(study, runs, out / 'plot.png')
    return text
