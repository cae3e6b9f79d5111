"""Checks of a config before anything is built from it.

A wrong path or a wrong number of classes costs users hours when it shows up
as an index error on a GPU or as an AP of zero. These functions look at the
config alone and raise :class:`FileNotFoundError` or :class:`ValueError` with
a message that names the field.
"""

import importlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from lors_plugin.utils import few, type_name

DOWNLOADABLE = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
HOSTS = {'mmdet': 'mmdet', 'mmpretrain': 'mmpretrain', 'mmcls': 'mmpretrain'}

_NO_CHECKS = (
    '. If it is meant to be so, as with a class-agnostic head, --no-checks '
    'turns this check off'
)

ClassLookup = Callable[[dict], Optional[Sequence[str]]]


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


def _dataloaders(cfg: dict, phases: Sequence[str]) -> list[tuple[str, dict]]:
    """Return path and config of every data set that the phases use."""
    found = []
    for phase in phases:
        loader = cfg.get(f'{phase}_dataloader')
        if loader:
            found += iter_datasets(
                loader.get('dataset'), f'{phase}_dataloader.dataset'
            )
    return found


def _is_local(path: Any, owner: dict) -> bool:
    """Return whether ``path`` is one of this machine's file system."""
    backend = (owner.get('backend_args') or {}).get('backend', 'local')
    remote = '://' in str(path) or str(path).startswith('s3:')
    return backend == 'local' and not remote


def _joined(path: str, data_root: Optional[str]) -> Path:
    """Join as :class:`mmengine.dataset.BaseDataset` does."""
    return Path(data_root or '') / path


def _missing_in_dataset(field: str, dataset: dict) -> list[tuple[str, Path]]:
    """Return field and path of everything that a data set lacks."""
    name = type_name(dataset.get('type'))
    if dataset.get('download', name in DOWNLOADABLE):
        return []
    root = dataset.get('data_root')
    if root and _is_local(root, dataset) and not Path(root).is_dir():
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
        path = _joined(value, root)
        if _is_local(path, dataset) and not path.exists():
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
    for field, dataset in _dataloaders(cfg, phases):
        missing += _missing_in_dataset(field, dataset)
    for phase in phases:
        evaluators = cfg.get(f'{phase}_evaluator') or []
        single = isinstance(evaluators, dict)
        for i, item in enumerate([evaluators] if single else evaluators):
            path = item.get('ann_file') if isinstance(item, dict) else None
            if path and _is_local(path, item) and not Path(path).is_file():
                index = '' if single else f'.{i}'
                field = f'{phase}_evaluator{index}.ann_file'
                missing.append((field, Path(path)))
    if not missing:
        return
    lines = '\n'.join(f'  {field}: {path}' for field, path in missing)
    raise FileNotFoundError(
        f'the config names data that is not there:\n{lines}\n'
        f'Relative paths start from the current directory, {Path.cwd()}.\n'
        'Put the data there (docs/en says how it is laid out) or name your '
        f'own place: --cfg-options {missing[0][0]}=/your/path'
    )


def read_categories(ann_file: str | Path) -> Optional[list[str]]:
    """Read the category names of a COCO annotation file.

    The list is taken out of the file without parsing the rest, which takes
    a quarter of a minute for the training set of COCO.

    Args:
        ann_file (str | Path): A json file.

    Returns:
        list[str], optional: Names in the order of the file, or None if the
        file is not in COCO format.
    """
    path = Path(ann_file)
    if path.suffix != '.json' or path.stat().st_size == 0:
        return None
    key = b'"categories"'
    found = None
    with open(path, 'rb') as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = text.rfind(key)
        end = text.find(b']', start)
        if start >= 0 and end >= 0:
            chunk = text[start + len(key) : end + 1].lstrip(b' \t\r\n:')
            try:
                found = json.loads(chunk)
            except ValueError:  # lists within categories (keypoints)
                found = _load_categories(path)
        text.close()
    if not isinstance(found, list):
        return None
    names = [c.get('name') for c in found if isinstance(c, dict)]
    return names if names and all(names) else None


def _load_categories(path: Path) -> Any:
    """Parse the whole file for its categories."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f'{path} is not valid json: {error}') from None
    return content.get('categories') if isinstance(content, dict) else None


def dataset_classes(dataset: dict) -> Optional[Sequence[str]]:
    """Return the classes that a data set class has of its own.

    Args:
        dataset (dict): Config of a data set whose ``type`` is a class or a
            name with its scope, such as 'mmdet.CocoDataset'.

    Returns:
        Sequence[str], optional: The names, or None if not known.
    """
    kind = dataset.get('type')
    if isinstance(kind, str):
        scope, _, _ = kind.rpartition('.')
        try:
            registry = importlib.import_module(f'{scope}.registry')
            kind = registry.DATASETS.get(kind)
        except (ImportError, ValueError, AttributeError):
            return None
    return (getattr(kind, 'METAINFO', None) or {}).get('classes')


def _classes_in_use(
    field: str, dataset: dict, scope: Optional[str], lookup: ClassLookup
) -> tuple[Optional[list[str]], str]:
    """Return the classes a data set will have and where they come from."""
    classes = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str):
        path = Path(classes)
        if not path.is_file():
            raise ValueError(
                f'`{field}.metainfo.classes={classes!r}` is a text and no '
                f'such file exists; a single class needs a comma: '
                f'({classes!r},)'
            )
        return path.read_text(encoding='utf-8').split('\n'), str(path)
    if classes is not None:
        return list(classes), 'metainfo.classes'
    kind = dataset.get('type')
    if isinstance(kind, str) and '.' not in kind and scope:
        dataset = dict(dataset, type=f'{scope}.{kind}')
    classes = lookup(dataset)
    if classes is None:
        return None, ''
    return list(classes), f'the classes that {kind} has of its own'


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


def check_classes(
    cfg: dict,
    phases: Sequence[str],
    lookup: ClassLookup = dataset_classes,
) -> None:
    """Check model, data set and annotation file for the same classes.

    Args:
        cfg (:obj:`Config` or dict): The whole config.
        phases (Sequence[str]): Some of 'train', 'val' and 'test'.
        lookup (Callable): Tells the classes of a data set class.
            Defaults to :func:`dataset_classes`.

    Raises:
        ValueError: If they do not agree, naming both sides.
    """
    host = host_of(cfg)
    heads = model_num_classes(cfg.get('model') or {})
    for field, dataset in _dataloaders(cfg, phases):
        classes, origin = _classes_in_use(field, dataset, host, lookup)
        ann_file = dataset.get('ann_file')
        path = _joined(str(ann_file or ''), dataset.get('data_root'))
        categories, kind = None, 'categories'
        if ann_file and _is_local(path, dataset) and path.is_file():
            categories = read_categories(path)
        elif host == 'mmpretrain' and not ann_file:
            categories, kind = _folder_classes(dataset), 'class folders'
        if classes is None and categories is None:
            continue
        if classes is None:
            classes, origin = categories, f'the {kind} of {path}'
        elif categories is not None and ann_file:
            _check_names(field, classes, origin, categories, path)
        for name, count in heads.items():
            if count != len(classes):
                raise ValueError(
                    f'{name}={count}, but {field} has {len(classes)} '
                    f'classes by {origin}: {few(classes, 5)}.\n'
                    f'Set one to fit the other, for example --cfg-options '
                    f'{name}={len(classes)}{_NO_CHECKS}'
                )


def _check_names(field, classes, origin, categories, path):
    """Raise if a class of the data set is not in its annotation file."""
    absent = [c for c in classes if c not in categories]
    if absent:
        raise ValueError(
            f'{field}: {len(absent)} of {len(classes)} classes by {origin} '
            f'are not in the annotation file: {few(absent, 5)}.\n'
            f'{path} has {len(categories)} categories: '
            f'{few(categories, 5)}.\n'
            'Their boxes would be left out silently. Set '
            f'{field}.metainfo=dict(classes=(...)) to names of the file, '
            f'in the config, for each data set{_NO_CHECKS}'
        )


def _folder_classes(dataset: dict) -> Optional[list[str]]:
    """Return the class folders of a classification data set."""
    name = type_name(dataset.get('type'))
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        prefix = prefix.get('img_path', '')
    root = _joined(prefix, dataset.get('data_root'))
    if name != 'CustomDataset' or not root.is_dir():
        return None
    return sorted(p.name for p in root.iterdir() if p.is_dir()) or None
