"""Check data before a run: classes, and what will be kept of the files.

Classes that are in another order in the annotation file, boxes that the
loader drops, files that break an evaluation after an epoch: each of these is
found here, before anything is built, from the files themselves.
"""

import contextlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from mmengine.logging import print_log

from lors_plugin.utils import few, is_first_rank, type_name

from .coco_file import (
    Report,
    category_names,
    check_for_host_metric,
    how_to_repair,
    inspect,
    read_json,
)
from .preflight import (
    NO_CHECKS,
    classes_in_use,
    datasets_of,
    evaluators_of,
    folder_classes,
    host_of,
    is_local,
    joined,
    model_num_classes,
    reads_like_coco,
)


@dataclass
class Source:
    """A data set, or a metric with an annotation file of its own.

    Attributes:
        field (str): Its path within the config.
        phase (str): 'train', 'val' or 'test'.
        config (dict): Its config.
        kind (str): 'coco' for a data set that reads like ``CocoDataset``,
            'metric' for a ``CocoMetric``, 'other' for other data sets.
        path (Path, optional): Its annotation file, if it is a local one.
        classes (list[str], optional): The classes it will have.
        origin (str): Where these come from.
        report (Report, optional): What it keeps of the file.
    """

    field: str
    phase: str
    config: dict
    kind: str
    path: Optional[Path]
    classes: Optional[list[str]]
    origin: str
    report: Optional[Report] = None


def _sources(cfg: dict, phases: Sequence[str]) -> list[Source]:
    """Find the data sets and metrics of a config."""
    host, found = host_of(cfg), []
    for phase in phases:
        datasets = datasets_of(cfg, [phase])
        for field, dataset in datasets:
            classes, origin = classes_in_use(field, dataset, host)
            kind = 'coco' if reads_like_coco(dataset, host) else 'other'
            path = None
            if dataset.get('ann_file') and isinstance(
                dataset['ann_file'], str
            ):
                path = joined(dataset['ann_file'], dataset.get('data_root'))
                path = path if is_local(path, dataset) else None
            found.append(
                Source(field, phase, dataset, kind, path, classes, origin)
            )
        if not datasets:
            continue
        # A metric has the classes of the first data set.
        first = found[-len(datasets)]
        for field, metric in _coco_metrics(cfg, phase):
            file = metric.get('ann_file')
            if file and is_local(file, metric):
                found.append(
                    replace(
                        first,
                        field=field,
                        config=metric,
                        kind='metric',
                        path=Path(file),
                    )
                )
    return found


def _coco_metrics(cfg: dict, phase: str) -> list[tuple[str, dict]]:
    return [
        (field, item)
        for field, item in evaluators_of(cfg, phase)
        if type_name(item.get('type')) == 'CocoMetric'
    ]


def _is_ours(metric: dict) -> bool:
    """Return whether a metric is of this package."""
    kind = metric.get('type')
    name = kind if isinstance(kind, str) else kind.__module__
    return name.startswith('lors_plugin.')


def check_data(cfg: dict, phases: Sequence[str]) -> None:
    """Check classes and annotation files, and say what will be kept.

    Every annotation file is read once, on the first rank: launchers end the
    others where it fails. A line is logged about each file, as a warning if
    the loader drops boxes, if none is left, or if boxes or images are odd.

    Args:
        cfg (:obj:`Config` or dict): The whole config.
        phases (Sequence[str]): Some of 'train', 'val' and 'test'.

    Raises:
        ValueError: If classes of model, data sets and files do not agree, if
            the loader or the metric cannot read a file, or if there are no
            boxes to train on; with fields, files and reasons.
    """
    if not is_first_rank():
        return
    heads = model_num_classes(cfg.get('model') or {})
    sources = _sources(cfg, phases)
    files, problems = {}, []
    for source in sources:
        path = source.path and source.path.resolve()
        files.setdefault(path, []).append(source)
    for users in files.values():
        try:
            _check_file(users, heads)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        problems += _disagreements(sources + _others(cfg, phases), heads)
        for phase in phases:
            problems += _check_phase(
                [s for s in sources if s.phase == phase],
                _coco_metrics(cfg, phase),
            )
    if problems:
        raise ValueError('\n'.join(problems))


def _check_file(users: Sequence[Source], heads: dict[str, int]) -> None:
    """Check an annotation file against those who read it."""
    path, content = users[0].path, None
    if path is not None and any(user.kind != 'other' for user in users):
        content = read_json(path)
    elif path is not None and path.suffix == '.json' and path.is_file():
        # Of a format that is not known here: that it is COCO's is a guess.
        with contextlib.suppress(ValueError):
            content = read_json(path)
    lines = {}
    for user in users:
        if path is not None and user.kind != 'other':
            user.report = _inspect(user, content)
        _check_classes(user, content, heads)
        if path is not None and user.kind == 'coco':
            _check_kept(user)
            line = user.report.line(user.classes or ())
            lines.setdefault(line, []).append(user)
    for line, told in lines.items():
        report = told[0].report
        good = report.kept and not (report.dropped or report.odd)
        fields = ', '.join(user.field for user in told)
        print_log(
            f'{path} ({fields}): {line}',
            'current',
            logging.INFO if good else logging.WARNING,
        )


def _inspect(user: Source, content: Any) -> Report:
    """Inspect a file as a data set or a metric reads it, or raise."""
    config, filter_cfg = user.config, None
    if user.kind == 'coco':
        prefix = config.get('data_prefix') or {}
        if isinstance(prefix, dict) and 'img' not in prefix:
            raise ValueError(
                f'{user.field}.data_prefix needs `img`, the folder of the '
                f'pictures, and is {dict(prefix)}'
            )
        if not config.get('test_mode', False):
            filter_cfg = config.get('filter_cfg')
    report = inspect(content, user.classes, filter_cfg)
    faults, remedy = report.faults, how_to_repair(user.path)
    if not faults and user.kind == 'coco':
        remedy = 'Put the pictures there, or take them out of the json'
        for fault, path in _picture_faults(config, content['images']):
            faults.add(fault, path)
    elif not faults and not _is_ours(config):
        faults = check_for_host_metric(content)
    if faults:
        lines = '\n'.join(f'  {line}' for line in faults.lines())
        raise ValueError(
            f'{user.path} cannot be used as it is ({user.field}):\n{lines}\n'
            f'{remedy}'
        )
    return report


def _picture_faults(
    dataset: dict, images: Sequence[dict]
) -> Iterator[tuple[str, str]]:
    """Yield fault and path of pictures that cannot be loaded.

    They are not opened: what the file system tells without that is enough
    for those that are not there, empty or not ours to read.
    """
    loaders = [
        step
        for step in dataset.get('pipeline') or ()
        if isinstance(step, dict)
        and type_name(step.get('type')) == 'LoadImageFromFile'
    ]
    special = ('backend_args', 'file_client_args', 'ignore_empty')
    if not loaders or any(loaders[0].get(key) for key in special):
        return
    prefix = (dataset.get('data_prefix') or {}).get('img', '')
    folder = joined(prefix, dataset.get('data_root'))
    if not is_local(folder, dataset):
        return
    for image in images:
        path = os.path.join(folder, image['file_name'])
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            yield 'pictures are not there', path
        except OSError as error:
            yield f'pictures cannot be read ({error.strerror})', path
        else:
            if not stat.S_ISREG(status.st_mode):
                yield 'pictures are no files', path
            elif status.st_size == 0:
                yield 'pictures are empty files (0 bytes)', path
            elif not os.access(path, os.R_OK):
                yield 'pictures cannot be read (Permission denied)', path


def _check_kept(user: Source) -> None:
    """Raise if boxes are there and none of them will be used."""
    report = user.report
    if not report.images:
        raise ValueError(
            f'{user.path} ({user.field}): filter_cfg leaves no image of '
            f'{report.filtered}'
        )
    # Other classes or crowds alone may be meant so.
    if report.boxes and not report.kept and report.dropped:
        reasons = ', '.join(report.dropped.lines())
        raise ValueError(
            f'{user.path} ({user.field}): none of {report.boxes} boxes can '
            f'be used: {reasons}{NO_CHECKS}'
        )


def _check_classes(user: Source, content: Any, heads: dict[str, int]) -> None:
    """Check classes of a data set, its file and the model's heads."""
    categories, kind, place = category_names(content), 'categories', user.path
    if user.kind == 'other' and user.path is None:
        categories, kind, place = folder_classes(user.config)
    classes, origin = user.classes, user.origin
    if classes is None and categories is None:
        return
    if classes is None:
        user.classes = classes = categories
        origin = user.origin = f'the {kind} of {place}'
    elif categories is not None and kind == 'categories':
        _check_names(user, categories, content)
    for name, count in heads.items():
        if count != len(classes):
            raise ValueError(
                f'{name}={count}, but {user.field} has {len(classes)} '
                f'classes by {origin}: {few(classes, 5)}.\n'
                f'Set one to fit the other, for example --cfg-options '
                f'{name}={len(classes)}{NO_CHECKS}'
            )


def _check_names(user: Source, categories: list[str], content: dict) -> None:
    """Raise if classes and categories are not the same, in one order."""
    classes, path = user.classes, user.path
    absent = [c for c in classes if c not in categories]
    if absent:
        raise ValueError(
            f'{user.field}: {len(absent)} of {len(classes)} classes by '
            f'{user.origin} are not in the annotation file: '
            f'{few(absent, 5)}.\n'
            f'{path} has {len(categories)} categories: '
            f'{few(categories, 5)}.\n'
            'Their boxes would be left out silently. Set '
            'metainfo=dict(classes=(...)) to names of the file, in the '
            f'config, for each data set{NO_CHECKS}'
        )
    if user.kind == 'other':
        return
    used = [name for name in categories if name in classes]
    twice = [n for n, count in Counter(used).items() if count > 1]
    if twice and not (user.kind == 'metric' and _is_ours(user.config)):
        ids = [c['id'] for c in content['categories'] if c['name'] in twice]
        raise ValueError(
            f'{user.field}: {path} has the category {twice[0]!r} twice (ids '
            f'{few(ids, 5)}), so that there are more labels than classes.\n'
            f'{how_to_repair(path)}'
        )
    if list(dict.fromkeys(used)) != list(classes):
        raise ValueError(
            f'{user.field}: the classes are in another order than the '
            f'categories of {path}. MMDetection numbers labels by the file, '
            'so every name would be wrong.\n'
            f'  {user.origin}: {few(classes, 20)}\n'
            f'  the categories: {few(used, 20)}\n'
            f'Set classes={tuple(used)} for all data sets{NO_CHECKS}. Or, '
            'where the other files have the order of the classes, reorder '
            f'this one.\n{how_to_repair(path, classes)}'
        )


def _others(cfg: dict, phases: Sequence[str]) -> list[Source]:
    """Find the data sets of other phases, whose files may not be here."""
    found = []
    for phase in ('train', 'val', 'test'):
        if phase not in phases:
            with contextlib.suppress(ValueError):
                found += _sources(cfg, [phase])
    return found


def _disagreements(
    sources: Sequence[Source], heads: dict[str, int]
) -> list[str]:
    """Find data sets with other classes than the first one.

    Those of another number belong to another model, as inherited data sets
    of phases that are not run.
    """
    known = [s for s in sources if s.classes is not None and heads]
    return [
        f'{other.field} has the classes {few(other.classes, 20)} by '
        f'{other.origin}, but {known[0].field} has '
        f'{few(known[0].classes, 20)}: a label would have two meanings'
        f'{NO_CHECKS}'
        for other in known[1:]
        if other.classes != known[0].classes
        and len(other.classes) == len(known[0].classes)
    ]


def _check_phase(
    sources: Sequence[Source], metrics: Sequence[tuple[str, dict]]
) -> list[str]:
    """Check the data sets and metrics of a phase together."""
    read = [s for s in sources if s.report and s.kind == 'coco']
    if not read or any(s.report is None for s in sources):
        return []  # of other formats, or not on this machine
    problems = []
    if read[0].phase == 'train':
        if not any(s.report.kept for s in read):
            files = ', '.join(dict.fromkeys(str(s.path) for s in read))
            boxes = sum(s.report.boxes for s in read)
            problems.append(
                f'{files}: no boxes to train on, of {boxes} in the file: '
                f'{read[0].report.line(())}{NO_CHECKS}'
            )
        return problems
    ids, shared = set(), set()
    for source in read:
        shared |= ids & source.report.image_ids
        ids |= source.report.image_ids
    for field, metric in metrics:
        if metric.get('ann_file'):
            own = next((s for s in sources if s.field == field), None)
            unknown = ids - own.report.image_ids if own else ()
            if own and len(own.report.image_ids) > len(ids):
                print_log(
                    f'{own.path} ({field}.ann_file): {len(ids)} of '
                    f'{len(own.report.image_ids)} images are in the data set; '
                    'the boxes of the others count as missed',
                    'current',
                    logging.WARNING,
                )
            if unknown:
                problems.append(
                    f'{own.path} ({field}.ann_file) lacks {len(unknown)} of '
                    f'{len(ids)} images of {read[0].path}, by their ids '
                    f'(first: {next(iter(unknown))!r})'
                )
        if shared and (metric.get('ann_file') or not _is_ours(metric)):
            problems.append(
                f'{field}: {len(shared)} image ids are in several files '
                f'({", ".join(str(s.path) for s in read)}; first: '
                f'{next(iter(shared))!r}), so that it takes their images for '
                "the same; use type='lors_plugin.CocoMetric' without ann_file"
            )
        if not metric.get('ann_file'):
            problems += [
                f'{field} has no ann_file, and {s.field}.pipeline does not '
                "pack the ground truth: add 'instances' to the meta_keys of "
                'PackDetInputs, or set ann_file'
                for s in read
                if not _packs_instances(s.config)
            ]
    return problems


def _packs_instances(dataset: dict) -> bool:
    """Return whether a pipeline packs the ground truth for the metric."""
    steps = dataset.get('pipeline') or [{}]
    if type_name(steps[-1].get('type')) != 'PackDetInputs':
        return True  # unknown
    return 'instances' in (steps[-1].get('meta_keys') or ())
