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
        train (list[dict]): Records with ``step``, ``minutes`` and the losses.
        val (list[dict]): Records with ``step`` (counted in iterations) and
            the metrics.
    """

    train: list[dict] = field(default_factory=list)
    val: list[dict] = field(default_factory=list)


def read_scalars(path: Path) -> list[dict]:
    """Read the records of one log; a line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            logger.warning('%s: unreadable line left out', path)
    return records


def read_history(work_dir: str | Path) -> History:
    """Join the logs of a training, one folder per run named by its time.

    What a later run did again replaces the earlier records, so that both a
    resumed and a repeated training come out right.
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
    """Sort out ``loss`` and its parts, each summed over a decoder's stages."""
    losses: dict[str, np.ndarray] = {'loss': np.zeros(len(train))}
    for i, record in enumerate(train):
        for key, value in record.items():
            name = re.sub(r'^.*\d+[._]', '', key)
            if re.search(r'(^|[._])loss', name):
                losses.setdefault(name, np.zeros(len(train)))[i] += value
    return losses


def collect_metrics(val: Sequence[dict]) -> dict[str, list[tuple]]:
    """Sort out AP and AP50, as pairs of iteration and value."""
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

    ``window`` is the number of values on each side.
    """
    last = len(values) - 1
    reaches = [min(window, i, last - i) for i in range(len(values))]
    return np.array(
        [values[i - r : i + r + 1].mean() for i, r in enumerate(reaches)]
    )


def style_axes(axes: plt.Axes, train: Sequence[dict], ylabel: str) -> None:
    """Label the axes: iterations below, minutes of training above."""
    last = train[-1]
    epochs = last.get('epoch', 1)
    suffix = f' ({epochs} epochs)' if epochs > 1 else ''
    axes.set(xlabel=f'iteration{suffix}', ylabel=ylabel)
    axes.set_xlim(0, last['step'])
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    if last['minutes'] <= 0:
        return
    # To beyond the end, where no tick may bend back.
    steps = [0, *(r['step'] for r in train), 2 * last['step']]
    minutes = [0, *(r['minutes'] for r in train), 2 * last['minutes']]
    minutes = np.array(minutes) + 1e-9 * np.arange(len(minutes))
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
    """Draw the losses and the metrics into a picture."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout='constrained'
    )
    steps = [record['step'] for record in history.train]
    for i, (name, values) in enumerate(collect_losses(history.train).items()):
        color, wide, label = COLORS[i % len(COLORS)], 1.5, name
        if name == 'loss':
            color, wide, label = '#222222', 2.2, 'sum of all losses'
        left.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        curve = smooth(values, max(1, len(values) // 40))
        left.plot(steps, curve, color=color, linewidth=wide, label=label)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    style_axes(left, history.train, 'training loss (stages added up)')
    metrics = collect_metrics(history.val)
    highest = 0.05
    for color, (label, points) in zip(COLORS, sorted(metrics.items())):
        right.plot(*zip(*points), 'o-', color=color, label=label, ms=4)
        offset = dict(xytext=(0, 6), textcoords='offset points')
        last = f'{points[-1][1]:.3f}'
        right.annotate(last, points[-1], **offset, ha='right', color=color)
        highest = max(highest, *(value for _, value in points))
    style_axes(right, history.train, 'COCO box AP on the validation set')
    if metrics:
        right.set_ylim(0, 1.15 * highest)
        right.legend(frameon=False, loc='upper left')
    else:
        right.text(0.5, 0.5, 'not evaluated yet', transform=right.transAxes)
    figure.suptitle(title)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    parser = argparse.ArgumentParser(
        description='Plot the losses and the AP of a training'
    )
    parser.add_argument('work_dir', help='folder of the training')
    parser.add_argument(
        '--out', help='picture to write (default: WORK_DIR/training.png)'
    )
    parser.add_argument('--title', help='(default: name of WORK_DIR)')
    args = parser.parse_args(argv)
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
