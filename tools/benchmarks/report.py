"""What the benchmarks write: a table, a CSV and plots."""

import argparse
import csv
import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Optional

import torch

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.ops import compiled_library
from lors_plugin.ops.backend import triton_version
from lors_plugin.version import __version__

from harness import Lane  # isort: skip

COLUMNS = (
    'benchmark', 'case', 'provider', 'dtype', 'mode', 'metric', 'unit',
    'median', 'p20', 'p80', 'repeats', 'ratio_to_original', 'error',
    'device', 'device_name', 'threads', 'torch', 'triton', 'cpu_kernels',
    'lors_plugin', 'config',
)  # fmt: skip
COLORS = ('#555555', '#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee')


@dataclasses.dataclass
class Case:
    """One shape that is measured.

    Attributes:
        label (str): Short name.
        config (dict): All sizes, written to the CSV as JSON.
        build (Callable): Takes a batch size, returns the lanes, of which
            the first is the reference in float32.
        batch (int): Images.
        rate (bool): Whether images per second are reported too.
        double (Callable, optional): As ``build``, in float64 throughout,
            where gradients in float32 prove nothing.
    """

    label: str
    config: dict
    build: Callable[[int], list[Lane]]
    batch: int
    rate: bool = False
    double: Optional[Callable[[int], list[Lane]]] = None


def device_name(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_kernels(device: torch.device) -> str:
    """Instructions of the compiled code that runs there, '' without."""
    library = compiled_library.load() if device.type == 'cpu' else None
    return library.name if library else ''


class Report:
    """Collects rows and writes them.

    Args:
        name (str): Name of the benchmark.
        args (argparse.Namespace): From :func:`read_arguments`.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        version = triton_version()
        self.name, self.args = name, args
        self.rows: list[dict] = []
        self.machine = dict(
            benchmark=name,
            device=args.device.type,
            device_name=device_name(args.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton='.'.join(map(str, version)) if version else '',
            cpu_kernels=cpu_kernels(args.device),
            lors_plugin=__version__,
        )

    def add(
        self,
        case: Case,
        lane: Lane,
        mode: str,
        metric: str,
        unit: str,
        values: list,
        error: Optional[float],
    ) -> None:
        """Add a row for a case and lane."""
        spread = values * 4
        if len(values) > 1:
            spread = quantiles(values, n=5, method='inclusive')
        self.rows.append(
            dict(
                self.machine,
                case=case.label,
                provider=lane.provider,
                dtype=lane.dtype,
                mode=mode,
                metric=metric,
                unit=unit,
                median=median(values),
                p20=spread[0],
                p80=spread[3],
                repeats=len(values),
                error='' if error is None else f'{error:.1e}',
                config=json.dumps(case.config, sort_keys=True),
            )
        )

    def finish_case(self, case: Case) -> None:
        """Compare with 'original' in float32, and show the case."""
        rows = [row for row in self.rows if row['case'] == case.label]
        base = {
            (row['mode'], row['metric']): row['median']
            for row in rows
            if (row['provider'], row['dtype']) == ('original', 'float32')
        }
        for row in rows:
            original = base.get((row['mode'], row['metric']))
            row['ratio_to_original'] = (
                round(row['median'] / original, 4) if original else ''
            )
        print(table(case.label, rows), flush=True)

    def write(self) -> Path:
        """Write the CSV, and the plots where wanted."""
        folder = Path(self.args.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f'{self.name}_{self.args.device.type}.csv'
        with path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            for row in self.rows:
                values = {
                    key: f'{value:.6g}' if isinstance(value, float) else value
                    for key, value in row.items()
                }
                writer.writerow(values)
        print(f'wrote {path}')
        if not self.args.no_plots:
            plot(self.rows, path.with_suffix('.png'))
            print(f'wrote {path.with_suffix(".png")}')
        return path


def table(title: str, rows: list[dict]) -> str:
    """Rows of a case as text: one line a lane, ratios to 'original'."""
    columns = list(dict.fromkeys((r['mode'], r['metric']) for r in rows))
    units = {(r['mode'], r['metric']): r['unit'] for r in rows}
    cells = {}
    for row in rows:
        text = f'{row["median"]:.4g}'
        if row['repeats'] > 1:
            text += f' ({row["p20"]:.4g}..{row["p80"]:.4g})'
        if row['ratio_to_original'] != '':
            text += f' {row["ratio_to_original"]:.2f}x'
        lane = f'{row["provider"]} {row["dtype"]}'
        cells.setdefault(lane, {})[row['mode'], row['metric']] = text
    head = ['', *(f'{m} {k}, {units[m, k]}' for m, k in columns)]
    lines = [head]
    for lane, found in cells.items():
        lines.append([lane, *(found.get(column, '') for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths))
        for line in lines
    ]
    return '\n'.join([f'\n{title}', *(line.rstrip() for line in text)])


def plot(rows: list[dict], path: Path) -> None:
    """Draw the ratios to 'original' in float32, with the spread.

    Args:
        rows (list[dict]): All rows of a report.
        path (Path): The file to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row['ratio_to_original'] != '']
    panels = list(dict.fromkeys((r['mode'], r['metric']) for r in rows))
    cases = list(dict.fromkeys(row['case'] for row in rows))
    lanes = list(dict.fromkeys((r['provider'], r['dtype']) for r in rows))
    if not rows:
        return
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(2.5 + 1.5 * len(cases), 0.8 + 1.9 * len(panels)),
        sharex=True,
        squeeze=False,
        layout='constrained',
    )
    providers = list(dict.fromkeys(provider for provider, _ in lanes))
    width = 0.8 / len(lanes)
    for (mode, metric), axis in zip(panels, axes.flat):
        for index, lane in enumerate(lanes):
            found = {
                row['case']: row
                for row in rows
                if (row['provider'], row['dtype']) == lane
                and (row['mode'], row['metric']) == (mode, metric)
            }
            places = [cases.index(case) for case in found]
            ratios = [row['ratio_to_original'] for row in found.values()]
            spread = [
                [
                    row['ratio_to_original']
                    * abs(row[end] / row['median'] - 1)
                    for row in found.values()
                ]
                for end in ('p20', 'p80')
            ]
            axis.bar(
                [place - 0.4 + (index + 0.5) * width for place in places],
                ratios,
                width,
                yerr=spread,
                color=COLORS[providers.index(lane[0]) % len(COLORS)],
                hatch='' if lane[1] == 'float32' else '///',
                edgecolor='white',
                label=' '.join(lane),
                error_kw=dict(lw=0.8),
            )
        axis.axhline(1, color='#bbbbbb', lw=0.8, zorder=0)
        axis.set_title(f'{mode}: {metric}, original = 1', fontsize=9)
        axis.spines[['top', 'right']].set_visible(False)
    ticks = [case.replace(', ', '\n', 1) for case in cases]
    axes[-1, 0].set_xticks(range(len(cases)), ticks, fontsize=8)
    axes[0, 0].legend(
        fontsize=7, frameon=False, loc='upper left', bbox_to_anchor=(1, 1)
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
