"""VTAB-1k: the 19 tasks, the scale of each, the means of the three groups.

The runs ``-s0.1`` to ``-s10`` train on 800 images with one scale of the
adapters each; the scale is chosen by the other 200. ``-published`` trains on
all 1,000 with the scale of the released program, which its authors picked by
the test images. Folders and lists are those of the usual archive:

    python tools/studies/run.py vtab --runs '*-published'
    python tools/studies/run.py vtab --runs 'natural/*' --jobs 2
    # adapters before attentions only
    python tools/studies/run.py vtab --work-dir work_dirs/vtab_attn \
        --cfg-options custom_hooks.0.placement=attn
"""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from study import Run, Study

CONFIG = 'configs/rep_adapter/vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'
SCALES = (0.1, 0.5, 1, 5, 10)


class Task(NamedTuple):
    """A task.

    Attributes:
        folder (str): Its name in the archive.
        classes (int): Number of classes.
        scale (float): Published, before attentions and FFNs.
        scale_attn (float): Published, before attentions only.
    """

    folder: str
    classes: int
    scale: float
    scale_attn: float


GROUPS = dict(
    natural=[
        Task('cifar', 100, 0.1, 0.1),
        Task('caltech101', 102, 5, 10),
        Task('dtd', 47, 1, 0.1),
        Task('oxford_flowers102', 102, 0.5, 0.5),
        Task('oxford_iiit_pet', 37, 0.1, 0.1),
        Task('svhn', 10, 10, 10),
        Task('sun397', 397, 0.1, 0.1),
    ],
    specialized=[
        Task('patch_camelyon', 2, 1, 0.5),
        Task('eurosat', 10, 1, 5),
        Task('resisc45', 45, 5, 0.1),
        Task('diabetic_retinopathy', 5, 0.1, 0.5),
    ],
    structured=[
        Task('clevr_count', 8, 0.5, 1),
        Task('clevr_dist', 6, 0.1, 0.1),
        Task('dmlab', 6, 5, 5),
        Task('kitti', 4, 5, 1),
        Task('dsprites_loc', 16, 5, 10),
        Task('dsprites_ori', 16, 0.1, 5),
        Task('smallnorb_azi', 18, 10, 10),
        Task('smallnorb_ele', 9, 1, 1),
    ],
)


def options_of(task: Task, scale: float, all_images: bool) -> dict:
    """Entries of the config for a task."""
    options: dict[str, object] = {
        f'{split}_dataloader.dataset.data_root': f'data/vtab-1k/{task.folder}/'
        for split in ('train', 'val', 'test')
    }
    options['model.head.num_classes'] = task.classes
    options['data_preprocessor.num_classes'] = task.classes
    options['custom_hooks.RepAdapterHook.scale'] = scale
    if all_images:
        lists = 'train_dataloader.dataset.ann_file'
        options[lists] = 'train800val200.txt'
    return options


def summarise(runs: Mapping[str, dict]) -> str:
    """Tabulate what each task reached, and the means of the groups.

    Args:
        runs (dict[str, dict]): See ``report.collect``.

    Returns:
        str: A table in Markdown.
    """
    lines = [
        '| task | scale by validation | test | published scale | test |',
        '|---|--:|--:|--:|--:|',
    ]
    columns: list[list[float]] = [[], []]
    missing = []
    for group, tasks in GROUPS.items():
        reached: list[list[float]] = [[], []]
        for task in tasks:
            name = f'{group}/{task.folder}'
            found = {
                scale: runs[f'{name}-s{scale}']['summary']
                for scale in SCALES
                if f'{name}-s{scale}' in runs
            }
            cells = ['-', '-', f'{task.scale:g}', '-']
            if len(found) == len(SCALES):
                best = max(found, key=lambda s: found[s]['validation']['mean'])
                reached[0].append(found[best]['test']['mean'])
                cells[:2] = f'{best:g}', f'{reached[0][-1]:.1f}'
            published = runs.get(f'{name}-published')
            if published:
                reached[1].append(published['summary']['test']['mean'])
                cells[3] = f'{reached[1][-1]:.1f}'
            if len(found) < len(SCALES) and not published:
                missing.append(task.folder)
            lines.append(f'| {task.folder} | {" | ".join(cells)} |')
        means = ['-', '-']
        for i, values in enumerate(reached):
            if len(values) == len(tasks):
                columns[i].append(statistics.fmean(values))
                means[i] = f'**{columns[i][-1]:.1f}**'
        lines.append(f'| **{group}** | | {means[0]} | | {means[1]} |')
    means = [
        f'**{statistics.fmean(c):.1f}**' if len(c) == len(GROUPS) else '-'
        for c in columns
    ]
    lines.append(f'| **mean of the groups** | | {means[0]} | | {means[1]} |')
    if missing:
        lines += ['', f'Not trained yet: {", ".join(missing)}.']
    return '\n'.join(lines) + '\n'


def runs_of(group: str, task: Task) -> list[Run]:
    """Describe the trainings of a task."""
    name = f'{group}/{task.folder}'
    search = [
        Run(
            f'{name}-s{scale}',
            CONFIG,
            options_of(task, scale, False),
            best=True,
            test=True,
        )
        for scale in SCALES
    ]
    published = options_of(task, task.scale, True)
    return [*search, Run(f'{name}-published', CONFIG, published, test=True)]


STUDY = Study(
    title='VTAB-1k with adapters',
    page='configs/rep_adapter/README.md',
    runs=[
        run
        for group, tasks in GROUPS.items()
        for task in tasks
        for run in runs_of(group, task)
    ],
    metrics=dict(
        test=('test/accuracy/top1', 1),
        validation=('val/accuracy/top1', 1),
    ),
    seeds=(0,),
    summary=summarise,
)
