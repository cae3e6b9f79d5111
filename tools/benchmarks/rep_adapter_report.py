"""Tables and plots of the adapter benchmark."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from bccd_report import MEGA, make_rows, summarise  # noqa: E402
from plot_training import COLORS, GREY  # noqa: E402

KILO = 1e3


def group_runs(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Bring the runs of each way together, in their order.

    Args:
        runs (Sequence[dict]): Results of all runs, with ``arm``.

    Returns:
        dict[str, list[dict]]: Runs of each way.
    """
    groups = {}
    for run in runs:
        groups.setdefault(run['arm'], []).append(run)
    return groups


def spread(runs: Sequence[dict], key: str) -> str:
    """Mean and standard deviation as text.

    Args:
        runs (Sequence[dict]): Runs of one way.
        key (str): What to take of each.

    Returns:
        str: ``mean ± std``; without the latter for a single run.
    """
    values = summarise([run[key] for run in runs])
    text = f'{values["mean"]:.1f}'
    return f'{text} ± {values["std"]:.1f}' if len(runs) > 1 else text


def size_text(value: float) -> str:
    """Bytes as text.

    Args:
        value (float): Bytes.

    Returns:
        str: In kB or MB.
    """
    if value < MEGA:
        return f'{value / KILO:.0f} kB'
    return f'{value / MEGA:.1f} MB'


def count_text(value: float) -> str:
    """A number of parameters as text.

    Args:
        value (float): The number.

    Returns:
        str: In thousands or millions.
    """
    if value < MEGA:
        return f'{value / KILO:.1f} K'
    return f'{value / MEGA:.2f} M'


def accuracy_table(
    groups: Mapping[str, list[dict]],
    sizes: Mapping[str, dict],
    keys: Mapping[str, str],
) -> str:
    """Write sizes and accuracies as a table in markdown.

    Args:
        groups (dict[str, list[dict]]): Runs of each way.
        sizes (dict[str, dict]): What was measured of each way; may be empty.
        keys (dict[str, str]): Metrics of a run by the name of their column;
            each seed of the last one is listed.

    Returns:
        str: The table.
    """
    last = list(keys)[-1]
    header = [
        'way', 'trained', 'of all', 'a task\'s file', *keys,
        f'{last} of each seed',
    ]  # fmt: skip
    rows = []
    for name, runs in groups.items():
        size = sizes.get(name, {})
        trained = size.get('trained', runs[0].get('trained'))
        total = size.get('params')
        file = size.get('adapter_file', runs[0].get('checkpoint_bytes'))
        rows.append(
            [
                name,
                count_text(trained) if trained else '-',
                f'{100 * trained / total:.2f} %' if total else '-',
                size_text(file) if file else '-',
                *(spread(runs, key) for key in keys.values()),
                ', '.join(f'{run[keys[last]]:.1f}' for run in runs),
            ]
        )
    return make_rows(header, rows)


def cost_table(measured: Mapping[str, dict], baseline: str) -> str:
    """Write time and memory of training as a table in markdown.

    Args:
        measured (dict[str, dict]): See :func:`rep_adapter_measure.measure`.
        baseline (str): Way that the others are relative to.

    Returns:
        str: The table.
    """
    header = [
        'way', 'training iteration', f'of {baseline}', 'state',
        'kept for backward', f'both, of {baseline}',
    ]  # fmt: skip
    rows = []
    base = measured[baseline]
    for name, values in measured.items():
        seconds = values['train_seconds']['median']
        memory = [values['memory'][key] for key in ('state', 'saved')]
        share = sum(memory) / sum(base['memory'].values())
        share_time = seconds / base['train_seconds']['median']
        rows.append(
            [
                name,
                f'{1000 * seconds:.0f} ms',
                f'{100 * share_time:.0f} %',
                *(f'{size / MEGA:.0f} MB' for size in memory),
                f'{100 * share:.0f} %',
            ]
        )
    return make_rows(header, rows)


def latency_table(latency: Mapping) -> str:
    """Write the latencies as a table in markdown.

    Args:
        latency (dict): See :func:`rep_adapter_measure.measure_latency`.

    Returns:
        str: The table; a cell has the median, the quartiles and the ratio of
        medians to the plain model.
    """
    plain = latency['seconds']['plain']
    header = ['model', *(f'batch {batch}' for batch in plain)]
    rows = []
    for name, values in latency['seconds'].items():
        cells = []
        for batch, value in values.items():
            low, high = value['quartiles']
            ratio = value['median'] / plain[batch]['median']
            cells.append(
                f'{1000 * value["median"]:.1f} ms ({1000 * low:.1f} to '
                f'{1000 * high:.1f}), {100 * ratio:.0f} %'
            )
        rows.append([name, *cells])
    return make_rows(header, rows)


def write_csv(
    groups: Mapping[str, list[dict]], keys: Sequence[str], path: Path
) -> None:
    """Write one line a run.

    Args:
        groups (dict[str, list[dict]]): Runs of each way.
        keys (Sequence[str]): What to write of each run.
        path (Path): File to write.
    """
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['way', *keys])
        for name, runs in groups.items():
            for run in runs:
                writer.writerow([name, *(run.get(key, '') for key in keys)])


def plot_accuracy(
    groups: Mapping[str, list[dict]],
    sizes: Mapping[str, dict],
    key: str,
    labels: tuple[str, str, str],
    path: Path,
) -> None:
    """Draw a metric against what is trained, a dot a seed.

    Args:
        groups (dict[str, list[dict]]): Runs of each way.
        sizes (dict[str, dict]): What was measured of each way.
        key (str): Metric of a run.
        labels (tuple[str]): Of both axes, and the title.
        path (Path): Picture to write.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout='constrained')
    seen = []
    for i, (name, runs) in enumerate(groups.items()):
        values = [run[key] for run in runs]
        size = sizes.get(name, runs[0])['trained'] / MEGA
        center = summarise(values)
        color = COLORS[i % len(COLORS)]
        marker = 'osD^'[i // len(COLORS) % 4]
        # Ways of the same size beside each other.
        size *= 1.06 ** sum(abs(size - other) < 1e-9 for other in seen)
        seen.append(size)
        axes.errorbar(
            [size], [center['mean']], [center['std']], fmt='_', color=color,
            ms=18, capsize=4,
        )  # fmt: skip
        axes.plot(
            [size] * len(values), values, marker, color=color, alpha=0.6,
            label=name, ms=5,
        )  # fmt: skip
    axes.set_xscale('log')
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(labels[2])
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(colors=GREY)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_latency(latency: Mapping, path: Path) -> None:
    """Draw the latencies as bars with quartiles.

    Args:
        latency (dict): See :func:`rep_adapter_measure.measure_latency`.
        path (Path): Picture to write.
    """
    batches = list(latency['seconds']['plain'])
    figure, panels = plt.subplots(
        1, len(batches), figsize=(7.6, 3.2), layout='constrained'
    )
    for axes, batch in zip(panels, batches):
        for i, values in enumerate(latency['seconds'].values()):
            low, high = (1000 * v for v in values[batch]['quartiles'])
            middle = 1000 * values[batch]['median']
            axes.bar(i, middle, color=COLORS[i], width=0.7)
            axes.errorbar(
                [i], [middle], [[middle - low], [high - middle]],
                color=GREY, capsize=4,
            )  # fmt: skip
        axes.set_xticks(range(3), list(latency['seconds']))
        axes.set_title(f'batch {batch}')
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('ms (median, quartiles)')
    figure.savefig(path, dpi=100)
    plt.close(figure)
