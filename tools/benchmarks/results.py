"""Report measurements: a table per case, one CSV file, and plots."""

import csv
import json
import platform
from pathlib import Path
from statistics import median, quantiles

import torch

COLUMNS = (
    'case', 'size', 'implementation', 'dtype', 'mode', 'metric', 'unit',
    'median', 'p20', 'p80', 'fastest', 'repeats', 'ratio', 'error', 'device',
    'device_name', 'threads', 'torch', 'triton', 'lors_plugin', 'config',
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """Name of the GPU or the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


class Report:
    """Collect rows and write them.

    Args:
        machine (dict): The columns that all rows share.
    """

    def __init__(self, machine: dict) -> None:
        self.machine = machine
        self.rows: list[dict] = []

    def add(
        self,
        case: str,
        size: str,
        config: dict,
        baseline: str,
        measured: list[tuple],
    ) -> None:
        """Add and print what was measured of a case at one size.

        Args:
            case (str): Name of the case.
            size (str): Short text.
            config (dict): The same in full, for the CSV file.
            baseline (str): Implementation that ratios refer to, in float32.
            measured (list[tuple]): Implementation, dtype, mode, metric,
                unit, values, largest error or None.
        """
        rows = []
        for name, dtype, mode, metric, unit, values, error in measured:
            spread = values * 4
            if len(values) > 1:
                spread = quantiles(values, n=5, method='inclusive')
            rows.append(
                dict(
                    self.machine,
                    case=case,
                    size=size,
                    implementation=name,
                    dtype=dtype,
                    mode=mode,
                    metric=metric,
                    unit=unit,
                    median=median(values),
                    p20=spread[0],
                    p80=spread[3],
                    fastest=min(values),
                    repeats=len(values),
                    error='' if error is None else f'{error:.1e}',
                    config=json.dumps(config, sort_keys=True),
                )
            )
        base = {
            (row['mode'], row['metric']): row['median']
            for row in rows
            if (row['implementation'], row['dtype']) == (baseline, 'float32')
        }
        for row in rows:
            wanted = base.get((row['mode'], row['metric']))
            row['ratio'] = row['median'] / wanted if wanted else ''
        self.rows += rows
        print(f'\n{case}: {size}\n{table(rows)}', flush=True)

    def write_rows(self, folder: Path) -> Path:
        """Write ``benchmarks.csv`` and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / 'benchmarks.csv'
        with path.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            for row in self.rows:
                values = {
                    key: f'{value:.6g}' if isinstance(value, float) else value
                    for key, value in row.items()
                }
                writer.writerow(values)
        return path

    def write(self, folder: Path) -> None:
        """Write ``benchmarks.csv`` and a plot per case."""
        print(f'\nwrote {self.write_rows(folder)}')
        for path in write_plots(self.rows, folder):
            print(f'wrote {path}')


def read_rows(path: Path) -> list[dict]:
    """Read what :meth:`Report.write_rows` wrote."""
    numbers = 'median', 'p20', 'p80', 'fastest', 'ratio'
    with path.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row['repeats'] = int(row['repeats'])
        row.update({n: float(row[n]) for n in numbers if row[n]})
    return rows


def write_plots(rows: list[dict], folder: Path) -> list[Path]:
    """Write a plot per case that has ratios; return their paths."""
    paths = []
    for case in dict.fromkeys(row['case'] for row in rows):
        found = [r for r in rows if r['case'] == case and r['ratio']]
        if found:
            paths.append(folder / f'{case}.png')
            plot(found, paths[-1])
    return paths


def table(rows: list[dict]) -> str:
    """Markdown table of one size: medians, 20 to 80 %, ratios."""
    columns = list(dict.fromkeys((r['mode'], r['metric']) for r in rows))
    units = {(r['mode'], r['metric']): r['unit'] for r in rows}
    cells = {}
    for row in rows:
        text = f'{row["median"]:.4g}'
        if row['repeats'] > 1:
            text += f' ({row["p20"]:.4g}..{row["p80"]:.4g})'
        if row['ratio']:
            text += f' {row["ratio"]:.2f}x'
        name = f'{row["implementation"]} {row["dtype"]}'
        cells.setdefault(name, {})[row['mode'], row['metric']] = text
    lines = [['', *(f'{m} {k}, {units[m, k]}'.strip() for m, k in columns)]]
    lines.append(['---'] * len(lines[0]))
    for name, found in cells.items():
        lines.append([name, *(found.get(column, '') for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [map(str.ljust, line, widths) for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw the ratios to the baseline of one case, with their spread.

    Args:
        rows (list[dict]): Rows with a ratio.
        path (Path): The image to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def distinct(*keys):
        return list(dict.fromkeys(tuple(r[k] for k in keys) for r in rows))

    panels, sizes = distinct('mode', 'metric'), distinct('size')
    bars, names = (
        distinct('implementation', 'dtype'),
        distinct('implementation'),
    )
    figure, axes = plt.subplots(
        len(panels),
        figsize=(3 + 1.5 * len(sizes), 0.8 + 1.9 * len(panels)),
        sharex=True,
        squeeze=False,
        layout='constrained',
    )
    width, colors = 0.8 / len(bars), plt.get_cmap('tab20')
    for panel, axis in zip(panels, axes.flat):
        for index, bar in enumerate(bars):
            found = [
                r
                for r in rows
                if (r['mode'], r['metric']) == panel
                and (r['implementation'], r['dtype']) == bar
            ]
            start = (index + 0.5) * width - 0.4
            axis.bar(
                [sizes.index((r['size'],)) + start for r in found],
                [r['ratio'] for r in found],
                width,
                yerr=[
                    [r['ratio'] * abs(r[end] / r['median'] - 1) for r in found]
                    for end in ('p20', 'p80')
                ],
                color=colors(names.index(bar[:1]) % colors.N),
                hatch='' if bar[1] == 'float32' else '///',
                edgecolor='white',
                label=' '.join(bar),
                error_kw=dict(lw=0.8),
            )
        axis.axhline(1, color='#bbbbbb', lw=0.8, zorder=0)
        axis.set_title(f'{" ".join(panel)}, baseline = 1', fontsize=9)
        axis.spines[['top', 'right']].set_visible(False)
    ticks = [size.replace(', ', '\n', 1) for (size,) in sizes]
    axes[-1, 0].set_xticks(range(len(sizes)), ticks, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=7, frameon=False, loc='outside right upper'
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
