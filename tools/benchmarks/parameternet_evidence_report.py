"""Table and plot of the ParameterNet evidence."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from bccd_report import COLORS, make_rows, plt, summarise
from mmengine.config import ConfigDict
from parameternet_evidence_runs import Recipe, build

from lors_plugin.analysis import count_model
from lors_plugin.reparam import reparameterize

SIDE = 28
GHOSTNET, REPCONV = 'GhostNet', 'RepConv'
VALUES = {
    'large': ('large', 'accuracy'),
    'scratch': ('scratch', 'accuracy'),
    'pretrained': ('pretrained', 'accuracy'),
    'scratch AUC': ('scratch', 'auc'),
    'pretrained AUC': ('pretrained', 'auc'),
}
HEADER = (
    'model',
    'seeds',
    'parameters',
    'multiply-adds',
    'large set',
    'small set, from scratch',
    'pretrained',
    'gain',
    'AUC from scratch',
    'pretrained',
    'gain',
)


def count(config: ConfigDict, options: dict) -> dict:
    """Count a classifier of ten classes as it runs at inference.

    Args:
        config (ConfigDict): Model of the config.
        options (dict): Of its backbone.

    Returns:
        dict[str, int]: ``parameters``, ``multiply_adds`` of an image of
        28 x 28 pixels, and ``trained``, the parameters in training.
    """
    model = build(config, options, 10).eval()
    trained = sum(p.numel() for p in model.parameters())
    if options.get('conv') == 'rep':
        reparameterize(model)
    image = torch.zeros(1, 1, SIDE, SIDE)
    counts = count_model(
        model, lambda: model(image, mode='tensor'), with_memory=False
    )
    return dict(
        parameters=counts.total.parameters,
        trained=trained,
        multiply_adds=counts.total.multiply_adds,
    )


def collect(
    results: Sequence[dict], options: Mapping[str, dict], config: ConfigDict
) -> dict:
    """Bring the runs of each model together.

    Args:
        results (Sequence[dict]): What the runs wrote.
        options (dict[str, dict]): Of the backbone of each model.
        config (ConfigDict): Model of the config.

    Returns:
        dict[str, dict]: For each model its counts, seeds, values of all
        seeds and their mean and deviation; ``gain`` is the mean of each
        seed's difference.
    """
    models = {}
    for name, backbone in options.items():
        runs = [run for run in results if run['model'] == name]
        if not runs:
            continue
        values = {
            key: [run[phase][metric] for run in runs]
            for key, (phase, metric) in VALUES.items()
        }
        for end in ('', ' AUC'):
            pairs = zip(values[f'pretrained{end}'], values[f'scratch{end}'])
            values[f'gain{end}'] = [after - before for after, before in pairs]
        models[name] = dict(
            seeds=[run['seed'] for run in runs],
            **count(config, backbone),
            values=values,
            **{key: summarise(numbers) for key, numbers in values.items()},
            experts=_experts(runs),
        )
    return models


def _experts(runs: Sequence[dict]) -> dict | None:
    """Means over the seeds of what routers did on the large set."""
    found = [run['large'].get('experts') for run in runs]
    found = [experts for experts in found if experts]
    if not found:
        return None
    return {key: sum(f[key] for f in found) / len(found) for key in found[0]}


def make_table(models: Mapping[str, dict]) -> str:
    """Write all values as a table in markdown.

    Args:
        models (dict[str, dict]): See :func:`collect`.

    Returns:
        str: Means and deviations over the seeds, in percent.
    """

    def cell(model, key, sign=''):
        value = model[key]
        return f'{value["mean"]:{sign}.1f} ± {value["std"]:.1f}'

    rows = [
        (
            name,
            str(len(model['seeds'])),
            f'{model["parameters"] / 1e3:.0f} k',
            f'{model["multiply_adds"] / 1e6:.2f} M',
            cell(model, 'large'),
            cell(model, 'scratch'),
            cell(model, 'pretrained'),
            cell(model, 'gain', '+'),
            cell(model, 'scratch AUC'),
            cell(model, 'pretrained AUC'),
            cell(model, 'gain AUC', '+'),
        )
        for name, model in models.items()
    ]
    return make_rows(HEADER, rows)


def make_usage_table(models: Mapping[str, dict]) -> str:
    """Write what routers did as a table in markdown."""
    rows = [
        (
            name,
            f'{model["experts"]["top"]:.2f}',
            f'{model["experts"]["entropy"]:.3f}',
            f'{model["experts"]["variation"]:.3f}',
            f'{model["experts"]["collapsed"]:.1f}',
        )
        for name, model in models.items()
        if model['experts']
    ]
    header = (
        'model', 'largest share', 'entropy', 'variation', 'collapsed layers'
    )  # fmt: skip
    return make_rows(header, rows)


def write_csv(models: Mapping[str, dict], path: Path) -> None:
    """Write a line for each model and seed."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        keys = list(next(iter(models.values()))['values'])
        writer.writerow(['model', 'seed', 'parameters', *keys])
        for name, model in models.items():
            for i, seed in enumerate(model['seeds']):
                numbers = [round(model['values'][k][i], 3) for k in keys]
                writer.writerow([name, seed, model['parameters'], *numbers])


def plot(models: Mapping[str, dict], path: Path) -> None:
    """Draw accuracies against parameters, a dot a model.

    Args:
        models (dict[str, dict]): See :func:`collect`.
        path (Path): Picture to write.
    """
    # What each panel shows, filled and open.
    panels = {
        'large set: accuracy (%)': ('large',),
        'small set: AUC (%)': ('pretrained AUC', 'scratch AUC'),
        'gain in AUC by the large set': ('gain AUC',),
    }
    families = dict(zip((GHOSTNET, REPCONV, 'sigmoid', 'softmax'), COLORS))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout='constrained')
    for ax, (label, keys) in zip(axes, panels.items()):
        for family, color in families.items():
            chosen = [m for n, m in models.items() if n.endswith(family)]
            for key, form in zip(keys, ('o-', 's:')):
                ax.errorbar(
                    [m['parameters'] / 1e3 for m in chosen],
                    [m[key]['mean'] for m in chosen],
                    [m[key]['std'] for m in chosen],
                    fmt=form,
                    color=color,
                    markerfacecolor=color if form == 'o-' else 'white',
                    capsize=4,
                    label=family if form == 'o-' else None,
                )
        ax.set_xlabel('parameters at inference (thousand)')
        ax.set_ylabel(label)
        ax.grid(color='#dddddd', linewidth=0.6)
        ax.spines[['top', 'right']].set_visible(False)
    axes[1].set_title('filled: pretrained; open: from scratch', fontsize=9)
    axes[2].axhline(0, color='#888888', linewidth=0.8)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(
    results: Sequence[dict],
    options: Mapping[str, dict],
    config: ConfigDict,
    recipe: Recipe,
    out: Path,
) -> None:
    """Write numbers, tables and the plot.

    Args:
        results (Sequence[dict]): What the runs wrote.
        options (dict[str, dict]): Of the backbone of each model.
        config (ConfigDict): Model of the config.
        recipe (Recipe): What all runs have in common.
        out (Path): Folder to write to.
    """
    out.mkdir(parents=True, exist_ok=True)
    models = collect(results, options, config)
    content = dict(
        recipe=asdict(recipe), torch=torch.__version__, models=models
    )
    (out / 'results.json').write_text(json.dumps(content, indent=1) + '\n')
    tables = make_table(models), make_usage_table(models)
    (out / 'table.md').write_text('\n'.join(tables))
    write_csv(models, out / 'results.csv')
    plot(models, out / 'parameternet_evidence.png')
