"""From a run of a study to the entries of its config that are overridden."""

import argparse
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config, DictAction
from study import ROOT, Run, StudyError

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
QUICK_IMAGES, QUICK_EPOCHS, QUICK_ITERS = 8, 2, 4


def make_options(
    run: Run, epochs: int | None, quick: bool, more: list[str]
) -> list[str]:
    """Collect the entries of a run's config to override.

    Args:
        run (Run): The run.
        epochs (int, optional): Length instead of the config's.
        quick (bool): A few images, once or twice.
        more (list[str]): The user's entries.

    Returns:
        list[str]: ``KEY=VALUE`` words for ``--cfg-options``.
    """
    cfg = load_config(run, [])
    options = {resolve_types(k, cfg): v for k, v in run.options.items()}
    words = [f'{k}={v}'.replace(' ', '') for k, v in options.items()]
    cfg, options = load_config(run, words), {}
    if 'max_iters' in cfg.train_cfg:
        # Else MMEngine logs all evaluations as those of epoch 0.
        options['default_hooks.logger.log_metric_by_epoch'] = False
    if quick:
        loaders = [name for name in LOADERS if cfg.get(name)]
        options |= {f'{k}.dataset.indices': QUICK_IMAGES for k in loaders}
        options['default_hooks.logger.interval'] = 1
        epochs = epochs or QUICK_EPOCHS
    if epochs:
        options |= length_options(cfg, epochs, quick)
    return words + [f'{k}={v}' for k, v in options.items()] + more


def load_config(run: Run, words: list[str]) -> Config:
    """Load the config of a run with entries overridden."""
    cfg = Config.fromfile(ROOT / run.config)
    try:
        cfg.merge_from_dict(parse_options(words))
    except (IndexError, KeyError, TypeError) as error:
        raise StudyError(
            f'{run.config} has no place for {" ".join(words)}: {error}'
        ) from error
    return cfg


def parse_options(words: list[str]) -> dict:
    """Parse ``KEY=VALUE`` words as tools/train.py does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='*', action=DictAction, default={})
    return parser.parse_args(['--options', *words]).options


def resolve_types(key: str, cfg: Config) -> str:
    """Replace types of list items by indices.

    Args:
        key (str): ``custom_hooks.RepAdapterHook.scale``, for example.
        cfg (Config): The config.

    Returns:
        str: ``custom_hooks.0.scale``.

    Raises:
        StudyError: If the list has not exactly one item of the type.
    """
    words, value = key.split('.'), cfg.to_dict()
    for i, word in enumerate(words):
        if isinstance(value, list) and not word.isdigit():
            kinds = [str(x.get('type')).rpartition('.')[2] for x in value]
            if kinds.count(word) != 1:
                raise StudyError(
                    f'{cfg.filename}: {key} wants one {word}, and '
                    f'{".".join(words[:i])} has {", ".join(kinds) or "none"}'
                )
            words[i] = str(kinds.index(word))
        if isinstance(value, list):
            value = value[int(words[i])]
        else:
            value = value.get(word) if isinstance(value, Mapping) else None
    return '.'.join(words)


def length_options(cfg: Config, epochs: int, quick: bool) -> dict:
    """Entries of a config that set the length of a training."""
    by_epoch = 'max_epochs' in cfg.train_cfg
    if not by_epoch and not quick:
        raise StudyError(
            f'{cfg.filename} counts iterations: give --cfg-options '
            'train_cfg.max_iters=N instead of --epochs'
        )
    unit = 'max_epochs' if by_epoch else 'max_iters'
    length = epochs if by_epoch else QUICK_ITERS
    every = min(length, cfg.train_cfg.get('val_interval', 1))
    options = {
        f'train_cfg.{unit}': length,
        'train_cfg.val_interval': length // 2 or 1 if quick else every,
    }
    for i, scheduler in enumerate(cfg.get('param_scheduler') or ()):
        if scheduler.get('by_epoch', True) != by_epoch:
            continue
        for name in ('T_max', 'end'):
            if scheduler.get(name) == cfg.train_cfg[unit]:
                options[f'param_scheduler.{i}.{name}'] = length
        if scheduler.get('begin', 0) >= length:
            options[f'param_scheduler.{i}.begin'] = length - 1
    return options


def make_paths(run: Run, words: list[str], data: Path, page: str) -> list[str]:
    """Make the paths of data and weights absolute.

    Args:
        run (Run): The run.
        words (list[str]): Entries of its config to override.
        data (Path): Folder instead of ``data``.
        page (str): Document to name where something is missing.

    Returns:
        list[str]: More entries to override.

    Raises:
        StudyError: If data or weights are missing.
    """
    cfg, result = load_config(run, words), []
    for key, value in strings_of(cfg.to_dict()):
        first = key.split('.')[0]
        folder, _, rest = value.partition('/')
        if folder == 'data' and first.endswith(('_dataloader', '_evaluator')):
            path = data / rest
        elif folder == 'checkpoints' and first == 'model':
            path = ROOT / value
        else:
            continue
        if not path.exists():
            raise StudyError(
                f'{path} does not exist: {page} says how to get it; --data '
                'names another folder of data sets'
            )
        result.append(f'{key}={path}')
    return result


def strings_of(value: object, key: str = '') -> Iterator[tuple[str, str]]:
    """All strings inside a config, with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from strings_of(item, f'{key}.{name}' if key else name)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from strings_of(item, f'{key}.{i}')


def count_parameters(
    run: Run, words: list[str], parts: Mapping[str, str]
) -> dict[str, int]:
    """Count the parameters of a run's model.

    Args:
        run (Run): The run.
        words (list[str]): Entries of its config to override.
        parts (dict[str, str]): Submodules by label.

    Returns:
        dict[str, int]: All ``parameters``, those that are ``trained``, and
        those of the parts that the model has.
    """
    # It imports the hosts, which takes seconds.
    from lors_plugin.build import build_model
    from lors_plugin.utils import part_of, type_name

    cfg = load_config(run, words)
    logging.disable(logging.INFO)  # a line for each pretrained weight
    model = build_model(cfg).train()
    logging.disable(logging.NOTSET)
    for hook in cfg.get('custom_hooks') or ():
        if type_name(hook['type']) == 'FreezeHook':
            for name in hook.get('modules', ['backbone']):
                part_of(model, name).requires_grad_(False)
    params = list(model.parameters())
    counts = dict(
        parameters=sum(p.numel() for p in params),
        trained=sum(p.numel() for p in params if p.requires_grad),
    )
    modules = dict(model.named_modules())
    for label, name in parts.items():
        if name in modules:
            own = modules[name].parameters()
            counts[label] = sum(p.numel() for p in own)
    return counts
