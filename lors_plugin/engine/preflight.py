"""Checks of a config before anything is built from it.

A wrong path or a wrong number of classes costs users hours when it shows up
as an index error on a GPU or as an AP of zero. These functions look at the
config alone and raise :class:`FileNotFoundError` or :class:`ValueError` with
a message that names the field.
"""

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from mmengine.fileio import list_from_file

from lors_plugin.utils import few, type_name

DOWNLOADABLE = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
HOSTS = {'mmdet': 'mmdet', 'mmpretrain': 'mmpretrain', 'mmcls': 'mmpretrain'}

NO_CHECKS = (
    '. If it is meant to be so, as with a class-agnostic head, --no-checks '
    'turns this check off'
)


def host_of(cfg: dict) -> Optional[str]:
    """Return the host package of a config.

    Args:
        cfg (:obj:`Config` or dict): The whole config.

    Returns:
        str, optional: 'mmdet', 'mmpretrain' or None for any other scope.
    """
    return HOSTS.get(cfg.get('default_scope'))


def iter_datasets(cfg: Any, field: str) -> Iterator[tuple[str, dict]]:
    """Yield the innermost data sets of a data set config.

    Args:
        cfg (dict | list): A data set config; wrappers hold theirs in
            ``dataset`` or ``datasets``.
        field (str): The path of ``cfg`` within the whole config.

    Yields:
        tuple[str, dict]: Path and config of each data set.
    """
    if isinstance(cfg, (list, tuple)):
        for index, child in enumerate(cfg):
            yield from iter_datasets(child, f'{field}.{index}')
    elif isinstance(cfg, dict):
        nested = [k for k in ('dataset', 'datasets') if k in cfg]
        for key in nested:
            yield from iter_datasets(cfg[key], f'{field}.{key}')
        if not nested:
            yield field, cfg


def datasets_of(cfg: dict, phases: Sequence[str]) -> list[tuple[str, dict]]:
    """Return path and config of every data set that the phases use."""
    found = []
    for phase in phases:
        loader = cfg.get(f'{phase}_dataloader')
        if loader:
            found += iter_datasets(
                loader.get('dataset'), f'{phase}_dataloader.dataset'
            )
    return found


def evaluators_of(cfg: dict, phase: str) -> list[tuple[str, dict]]:
    """Return path and config of the metrics of a phase."""
    evaluators = cfg.get(f'{phase}_evaluator') or []
    field = f'{phase}_evaluator'
    if isinstance(evaluators, dict):
        return [(field, evaluators)]
    return [
        (f'{field}.{i}', item)
        for i, item in enumerate(evaluators)
        if isinstance(item, dict)
    ]


def is_local(path: Any, owner: dict) -> bool:
    """Return whether ``path`` is one of this machine's file system."""
    backend = (owner.get('backend_args') or {}).get('backend', 'local')
    remote = '://' in str(path) or str(path).startswith('s3:')
    return backend == 'local' and not remote


def joined(path: str, data_root: Optional[str]) -> Path:
    """Join as :class:`mmengine.dataset.BaseDataset` does."""
    return Path(data_root or '') / path


def _missing_in_dataset(field: str, dataset: dict) -> list[tuple[str, Path]]:
    """Return field and path of everything that a data set lacks."""
    name = type_name(dataset.get('type'))
    if dataset.get('download', name in DOWNLOADABLE):
        return []
    root = dataset.get('data_root')
    if root and is_local(root, dataset) and not Path(root).is_dir():
        return [(f'{field}.data_root', Path(root))]
    wanted = []
    ann_files = dataset.get('ann_file') or []
    if isinstance(ann_files, str):
        wanted.append(('ann_file', ann_files))
    else:
        wanted += [(f'ann_file.{i}', a) for i, a in enumerate(ann_files)]
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        wanted.append(('data_prefix', prefixes))
    else:
        wanted += [(f'data_prefix.{k}', p) for k, p in prefixes.items() if p]
    missing = []
    for key, value in wanted:
        path = joined(value, root)
        if is_local(path, dataset) and not path.exists():
            missing.append((f'{field}.{key}', path))
    return missing


def check_data_paths(cfg: dict, phases: Sequence[str]) -> None:
    """Check that the data sets and annotations of a config are there.

    Args:
        cfg (:obj:`Config` or dict): The whole config.
        phases (Sequence[str]): Some of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: Naming each field with its path.
    """
    missing = []
    for field, dataset in datasets_of(cfg, phases):
        missing += _missing_in_dataset(field, dataset)
    for phase in phases:
        for field, item in evaluators_of(cfg, phase):
            path = item.get('ann_file')
            if path and is_local(path, item) and not Path(path).is_file():
                missing.append((f'{field}.ann_file', Path(path)))
    if not missing:
        return
    lines = '\n'.join(f'  {field}: {path}' for field, path in missing)
    raise FileNotFoundError(
        f'the config names data that is not there:\n{lines}\n'
        f'Relative paths start from the current directory, {Path.cwd()}.\n'
        'Put the data there (docs/en says how it is laid out) or name your '
        f'own place: --cfg-options {missing[0][0]}=/your/path'
    )


def _dataset_class(dataset: dict, scope: Optional[str]) -> Any:
    """Return the class of a data set, or None if it cannot be found."""
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    prefix, _, name = kind.rpartition('.')
    scope = prefix or scope
    try:
        registry = importlib.import_module(f'{scope}.registry')
        return registry.DATASETS.get(f'{scope}.{name}')
    except (ImportError, ValueError, AttributeError):
        return None


def dataset_classes(
    dataset: dict, scope: Optional[str] = None
) -> Optional[Sequence[str]]:
    """Return the classes that a data set class has of its own.

    Args:
        dataset (dict): Config of a data set.
        scope (str, optional): The host package, for a ``type`` that is a
            name without scope.

    Returns:
        Sequence[str], optional: The names, or None if not known.
    """
    kind = _dataset_class(dataset, scope)
    return (getattr(kind, 'METAINFO', None) or {}).get('classes')


def reads_like_coco(dataset: dict, scope: Optional[str]) -> bool:
    """Return whether a data set reads annotations as ``CocoDataset`` does."""
    kind = _dataset_class(dataset, scope)
    if not hasattr(kind, 'COCOAPI'):
        return False
    coco = importlib.import_module('mmdet.datasets.coco').CocoDataset
    return issubclass(kind, coco) and all(
        getattr(kind, name) is getattr(coco, name)
        for name in ('load_data_list', 'parse_data_info')
    )


def _read_classes_file(field: str, name: str) -> list[str]:
    """Read class names, one per line, as MMEngine does."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f'`{field}.metainfo.classes={name!r}` is a text and no such file '
            f'exists; a single class needs a comma: ({name!r},)'
        )
    try:
        classes = list_from_file(path)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8: {error}') from None
    for number, line in enumerate(classes, 1):
        if not line.strip() or line != line.strip(' \t\ufeff'):
            raise ValueError(
                f'{path}, line {number}: {line!r} is not a class name; '
                f'{field}.metainfo.classes needs one name per line, without '
                'empty lines, blanks around it or a byte order mark'
            )
    return classes


def classes_in_use(
    field: str, dataset: dict, scope: Optional[str]
) -> tuple[Optional[list[str]], str]:
    """Return the classes a data set will have and where they come from."""
    classes = (dataset.get('metainfo') or {}).get('classes')
    origin = 'metainfo.classes'
    if isinstance(classes, str):
        classes, origin = _read_classes_file(field, classes), classes
    elif classes is None:
        classes = dataset_classes(dataset, scope)
        origin = f'the classes that {dataset.get("type")} has of its own'
    if classes is None:
        return None, ''
    twice = [n for n, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(
            f'{field}: {origin} has a name twice: {few(twice, 5)}'
        )
    return list(classes), origin


def model_num_classes(model: Any, field: str = 'model') -> dict[str, int]:
    """Collect every ``num_classes`` of the heads in a model config.

    Args:
        model (dict | list): The model config or a part of it.
        field (str): The path of ``model``. Defaults to 'model'.

    Returns:
        dict[str, int]: Path of each field and its value.
    """
    skipped = ('backbone', 'data_preprocessor', 'init_cfg', 'reid')
    skipped += ('semantic_head',)
    found = {}
    if isinstance(model, dict) and 'language_model' in model:
        return found  # an open vocabulary: the number is a capacity
    if isinstance(model, (list, tuple)):
        for index, child in enumerate(model):
            found.update(model_num_classes(child, f'{field}.{index}'))
    elif isinstance(model, dict):
        for key, value in model.items():
            path = f'{field}.{key}'
            if key == 'num_classes' and isinstance(value, int):
                if value > 0:
                    found[path] = value
            elif key not in skipped:
                found.update(model_num_classes(value, path))
    return found


def folder_classes(dataset: dict) -> tuple[Optional[list[str]], str, Path]:
    """Return the class folders of a classification data set."""
    name = type_name(dataset.get('type'))
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path', '')
    root = joined(prefix, dataset.get('data_root'))
    classes = None
    if (
        name == 'CustomDataset'
        and dataset.get('with_label', True)
        and root.is_dir()
    ):
        classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    return classes or None, 'class folders', root
