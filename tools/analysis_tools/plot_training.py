"""Plot the losses and the AP of a training.

Reads what MMEngine logs in ``WORK_DIR/*/vis_data/scalars.json``; parts of a
training that was interrupted and resumed are joined.

Example:
    python tools/analysis_tools/plot_training.py work_dirs/quickstart
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

logger = logging.getLogger('plot_training')

COLORS = ('#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee', '#aa3377')
GREY = '#555555'


class PlotError(RuntimeError):
    """There is nothing to plot."""


@dataclass
class History:
    """Logged values of one training.

    Attributes:
        train (list[dict]): Records with ``step`` and ``minutes`` and the
            loss values.
        val (list[dict]): Records with ``step`` (counted in iterations) and
            the metrics.
    """

    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)


def read_scalars(path: Path) -> list[dict]:
    """Read one log; a last line that was cut off is left out.

    Args:
        path (Path): A ``scalars.json``, one json object a line.

    Returns:
        list[dict]: The records.
    """
    records = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning('%s: unreadable line left out', path)
    return records


def read_history(work_dir: str | Path) -> History:
    """Join the logs of a training.

    What a later run did again replaces the earlier records, so that both a
    resumed and a repeated training come out right.

    Args:
        work_dir (str or Path): Folder with one folder a run, named by its
            time.

    Returns:
        History: Records in the order of the iterations.
    """
    history = History()
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        records = read_scalars(path)
        steps = [r['step'] for r in records if 'loss' in r]
        if not steps:
            continue
        history.train = [r for r in history.train if r['step'] < steps[0]]
        history.val = [r for r in history.val if r['step'] < steps[0]]
        previous = history.train[-1] if history.train else {}
        step, minutes = previous.get('step', 0), previous.get('minutes', 0.0)
        for record in records:
            if 'loss' in record:
                seconds = record.get('time', 0.0)
                minutes += seconds * (record['step'] - step) / 60
                step = record['step']
                history.train.append({**record, 'minutes': minutes})
            else:
                # MMEngine counts evaluations in epochs or in iterations,
                # depending on the loop; here it is always iterations.
                history.val.append({**record, 'step': step})
    if not history.train:
        raise PlotError(f'no */vis_data/scalars.json with losses: {work_dir}')
    return history


def collect_losses(train: Sequence[dict]) -> dict[str, np.ndarray]:
    """Sort out the losses, each summed over the stages of a decoder.

    Args:
        train (Sequence[dict]): Training records.

    Returns:
        dict[str, np.ndarray]: ``loss`` first, then its parts.
    """
    losses: dict[str, np.ndarray] = {'loss': np.zeros(len(train))}
    for i, record in enumerate(train):
        for key, value in record.items():
            name = re.sub(r'^.*\d+[._]', '', key)
            if re.search(r'(^|[._])loss', name):
                losses.setdefault(name, np.zeros(len(train)))[i] += value
    return losses


def collect_metrics(val: Sequence[dict]) -> dict[str, list[tuple]]:
    """Sort out AP and AP50.

    Args:
        val (Sequence[dict]): Evaluation records.

    Returns:
        dict[str, list[tuple]]: Label, then pairs of iteration and value.
    """
    labels = {'bbox_mAP': 'AP', 'bbox_mAP_50': 'AP50'}
    metrics: dict[str, list[tuple]] = {}
    for record in val:
        for key, value in record.items():
            label = labels.get(key.split('/')[-1])
            if label and value >= 0:
                metrics.setdefault(label, []).append((record['step'], value))
    return metrics


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Smooth a curve by a centred mean that shrinks at the ends.

    Args:
        values (np.ndarray): Has shape (n, ).
        window (int): Number of values on each side.

    Returns:
        np.ndarray: Has shape (n, ).
    """
    return np.array(
        [
            values[i - reach : i + reach + 1].mean()
            for i in range(len(values))
            for reach in [min(window, i, len(values) - 1 - i)]
        ]
    )


def style_axes(axes: plt.Axes, train: Sequence[dict], ylabel: str) -> None:
    """Label the axes: iterations below, minutes of training above.

    Args:
        axes (Axes): The axes.
        train (Sequence[dict]): Training records.
        ylabel (str): Label of the vertical axis.
    """
    last = train[-1]
    epochs = last.get('epoch', 1)
    suffix = f' ({epochs} epochs)' if epochs > 1 else ''
    axes.set_xlabel(f'iteration{suffix}')
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, last['step'])
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    steps = [0] + [record['step'] for record in train]
    minutes = [0.0] + [record['minutes'] for record in train]
    if minutes[-1] <= 0:
        return
    for i in range(1, len(minutes)):
        minutes[i] = max(minutes[i], minutes[i - 1] + 1e-9)
    # Beyond the end, where no tick may bend back.
    steps.append(2 * steps[-1])
    minutes.append(2 * minutes[-1])
    top = axes.secondary_xaxis(
        'top',
        functions=(
            lambda x: np.interp(x, steps, minutes),
            lambda x: np.interp(x, minutes, steps),
        ),
    )
    top.set_xlabel('training time (min), without evaluation', color=GREY)
    top.tick_params(colors=GREY)
    top.spines['top'].set_color(GREY)


def plot_history(history: History, out: str | Path, title: str) -> None:
    """Draw the figure.

    Args:
        history (History): What was logged.
        out (str or Path): Picture to write.
        title (str): Title of the figure.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout='constrained'
    )
    steps = [record['step'] for record in history.train]
    for i, (name, values) in enumerate(collect_losses(history.train).items()):
        color = '#222222' if name == 'loss' else COLORS[i % len(COLORS)]
        wide = 2.2 if name == 'loss' else 1.5
        label = 'sum of all losses' if name == 'loss' else name
        left.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        curve = smooth(values, max(1, len(values) // 40))
        left.plot(steps, curve, color=color, linewidth=wide, label=label)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    style_axes(left, history.train, 'training loss (stages added up)')
    metrics = collect_metrics(history.val)
    for i, (label, points) in enumerate(sorted(metrics.items())):
        color = COLORS[i]
        right.plot(*zip(*points), 'o-', color=color, label=label, ms=4)
        right.annotate(
            f'{points[-1][1]:.3f}',
            points[-1],
            (0, 6),
            textcoords='offset points',
            ha='right',
            color=color,
        )
    style_axes(right, history.train, 'COCO box AP on the validation set')
    if metrics:
        right.set_ylim(0, 1.15 * max(0.05, *(m[1] for m in flat(metrics))))
        right.legend(frameon=False, loc='upper left')
    else:
        right.text(0.5, 0.5, 'not evaluated yet', transform=right.transAxes)
    figure.suptitle(title)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def flat(metrics: dict[str, list[tuple]]) -> list[tuple]:
    """Return the points of all metrics in one list.

    Args:
        metrics (dict[str, list[tuple]]): See :func:`collect_metrics`.

    Returns:
        list[tuple]: Pairs of iteration and value.
    """
    return [point for points in metrics.values() for point in points]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Plot the losses and the AP of a training'
    )
    parser.add_argument('work_dir', help='folder of the training')
    parser.add_argument(
        '--out', help='picture to write (default: WORK_DIR/training.png)'
    )
    parser.add_argument('--title', help='(default: name of WORK_DIR)')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    out = Path(args.out or Path(args.work_dir) / 'training.png')
    try:
        history = read_history(args.work_dir)
        name = args.title or Path(args.work_dir).resolve().name
        plot_history(history, out, name)
    except (PlotError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    logger.info('plot of the training: %s', out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
