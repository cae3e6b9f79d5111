"""Adapter files: what was trained, and on which base it stands."""

import json
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lors_plugin.checkpoints import load_checkpoint_file

from .fingerprint import (
    adapter_keys,
    base_entries,
    digest,
    trained_keys,
    unwrapped,
)
from .inject import (
    CHILD,
    AdapterReport,
    adapters_of,
    attach,
    detach,
    report_of,
)
from .rep_adapter import RepAdapter

META = 'lors_plugin_adapter'
VERSION = 1
_REPLACED = '_lors_plugin_replaced'


class AdapterFileError(ValueError):
    """An adapter file is damaged or belongs to another model."""


def adapter_checkpoint(
    model: nn.Module, options: Optional[dict[str, Any]] = None
) -> dict[str, Any]:
    """What an adapter file holds; save it with ``save_checkpoint_file``.

    Args:
        model (nn.Module): An adapted model, wrapped or not.
        options (dict, optional): Of :func:`inject_adapters`, for the record.

    Returns:
        dict: ``state_dict`` with adapters, trained heads and norms, and
        ``meta[META]`` with what :func:`adapter_meta` says.

    Raises:
        ValueError: If the model has no adapters.
    """
    model = unwrapped(model)
    state = model.state_dict()
    meta = adapter_meta(model, state, options)
    return {
        'meta': {META: meta},
        'state_dict': {
            key: state[key].detach().cpu().clone() for key in meta['keys']
        },
    }


def adapter_meta(
    model: nn.Module,
    state: dict[str, Tensor],
    options: Optional[dict[str, Any]] = None,
) -> dict[str, Any]:
    """Describe the adapters of a model and its base.

    Args:
        model (nn.Module): An adapted model, not wrapped.
        state (dict[str, Tensor]): Its state dict.
        options (dict, optional): Of :func:`inject_adapters`.

    Returns:
        dict: ``version``, ``options``, ``adapters`` (by layer),
        ``keys`` (of the state dict in the file), ``fingerprint`` and
        ``base`` (:func:`base_entries`). Plain values only.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError('the model has no adapters; inject_adapters first')
    trained = trained_keys(model)
    base = base_entries(state, trained)
    return dict(
        version=VERSION,
        options=json.loads(json.dumps(options or {})),
        adapters={name: a.options() for name, a in adapters.items()},
        keys=sorted(trained),
        fingerprint=digest(base),
        base=base,
    )


def is_adapter_checkpoint(checkpoint: Any) -> bool:
    """Whether a checkpoint holds adapters without their base."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return isinstance(meta, dict) and META in meta


def load_adapter_checkpoint(
    model: nn.Module, checkpoint: Union[dict, str, Path]
) -> AdapterReport:
    """Put the adapters of a file, and what was trained with them, on a base.

    Everything is checked before the first weight is written. A file may
    follow another one on the same model; what the former had replaced comes
    back first. Parameters in the file are trainable afterwards, all others
    are frozen, as when the file was made.

    Args:
        model (nn.Module): With the weights of the base; without adapters,
            with the same adapters, or with those of another file.
        checkpoint (dict | str | Path): An adapter file or its content.

    Returns:
        AdapterReport: Layers and counts.

    Raises:
        AdapterFileError: If the file is damaged, or the model is not the
            one that the adapters were trained on. Nothing is changed then.
    """
    if not isinstance(checkpoint, dict):
        checkpoint = load_checkpoint_file(checkpoint)
    model = unwrapped(model)
    meta, state = read(checkpoint)
    swap = hasattr(model, _REPLACED)
    before = getattr(model, _REPLACED, {})
    there = model.state_dict()
    own = adapter_keys(model)
    base = {k: v for k, v in there.items() if k not in own} | before
    new = {name: _build(name, a) for name, a in meta['adapters'].items()}
    _check_trained(base, new, state)
    check_base(base, meta)
    old = adapters_of(model)
    same = _signatures(old) == _signatures(new)
    if old and not same and not swap:
        raise AdapterFileError(_other_adapters(old, new))
    for name in new.keys() - old.keys():
        _check_layer(model, name)

    remove_adapters(model, keep=same)
    if not same:
        attach(model, new)
    there = model.state_dict()
    trained = [key for key in state if key in base]
    replaced = {key: there[key].clone() for key in trained}
    object.__setattr__(model, _REPLACED, replaced)
    with torch.no_grad():
        for key, value in state.items():
            there[key].copy_(value)
    for key, param in model.named_parameters(remove_duplicate=False):
        param.requires_grad_(key in state)
    return report_of(model)


def remove_adapters(model: nn.Module, keep: bool = False) -> list[str]:
    """Take adapters off a model and bring its base back, bit for bit.

    What :func:`load_adapter_checkpoint` had replaced (head, norms) returns;
    what was trained since :func:`inject_adapters` stays as trained.

    Args:
        model (nn.Module): Wrapped or not.
        keep (bool): Leave the adapters, bring back the rest only.

    Returns:
        list[str]: Names of the layers that had adapters.
    """
    model = unwrapped(model)
    names = list(adapters_of(model))
    if not keep:
        detach(model, names)
    replaced = getattr(model, _REPLACED, None)
    if replaced is not None:
        there = model.state_dict()
        with torch.no_grad():
            for key, value in replaced.items():
                there[key].copy_(value)
        object.__delattr__(model, _REPLACED)
    return names


def read(checkpoint: dict) -> tuple[dict, dict[str, Tensor]]:
    """Check that an adapter checkpoint is whole.

    Returns:
        tuple[dict]: What :func:`adapter_meta` said, and the weights.

    Raises:
        AdapterFileError: If it is not.
    """
    if not is_adapter_checkpoint(checkpoint):
        raise AdapterFileError(
            f'this is no adapter file: it has no meta[{META!r}]. Files of '
            'whole models load as any checkpoint'
        )
    meta, state = checkpoint['meta'][META], checkpoint.get('state_dict')
    version = meta.get('version') if isinstance(meta, dict) else None
    if version != VERSION:
        raise AdapterFileError(
            f'the adapter file has format version {version!r}, this '
            f'lors_plugin reads version {VERSION}; update lors_plugin or '
            'make the file anew'
        )
    kinds = dict(adapters=dict, keys=list, fingerprint=str, base=dict)
    for field, kind in kinds.items():
        if not isinstance(meta.get(field), kind):
            raise AdapterFileError(
                f'the adapter file is damaged: meta[{META!r}] has no {field}'
            )
    if not isinstance(state, dict) or set(state) != set(meta['keys']):
        found = set(state) if isinstance(state, dict) else set()
        odd = sorted(found ^ set(meta['keys']))
        raise AdapterFileError(
            f'the adapter file is damaged: {len(odd)} of its weights are '
            f'missing or not listed in its meta: {_few(odd)}'
        )
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.isfinite().all():
            raise AdapterFileError(
                f'the adapter file is damaged: {key} has numbers that are '
                'not finite'
            )
    if digest(meta['base']) != meta['fingerprint']:
        raise AdapterFileError(
            'the adapter file is damaged: its fingerprint does not fit its '
            'list of the base'
        )
    return meta, state


def check_base(state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Check that weights are those that adapters were trained on.

    Args:
        state (dict[str, Tensor]): State dict of the model, without adapters.
        meta (dict): Of the file, as :func:`adapter_meta` gave it.

    Raises:
        AdapterFileError: If not, naming what differs.
    """
    here = base_entries(state, meta['keys'])
    there = meta['base']
    if here == there:
        return
    lacking = sorted(there.keys() - here.keys())
    extra = sorted(here.keys() - there.keys())
    both = sorted(here.keys() & there.keys())
    other = [k for k in both if here[k] != there[k]]
    form = [
        f'{k} (file {_form(there[k])}, model {_form(here[k])})'
        for k in other
        if _form(here[k]) != _form(there[k])
    ]
    lines = ['these adapters were trained on another base:']
    if lacking or extra:
        lines.append(
            f'  the model lacks {len(lacking)} of its entries '
            f'({_few(lacking)}) and has {len(extra)} others ({_few(extra)}); '
            'its architecture, depth perhaps, is another'
        )
    if form:
        lines.append(f'  {len(form)} have another shape or type: {_few(form)}')
    elif other:
        lines.append(
            f'  {len(other)} of {len(both)} entries have other values: '
            f'{_few(other)}. Load the weights of the base first (init_cfg or '
            'the checkpoint that training began with)'
        )
    raise AdapterFileError('\n'.join(lines))


def _build(name: str, options: dict) -> RepAdapter:
    try:
        return RepAdapter(**options)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f'the adapter file is damaged: adapter of {name}: {error}'
        ) from error


def _check_trained(
    base: dict[str, Tensor],
    adapters: dict[str, RepAdapter],
    state: dict[str, Tensor],
) -> None:
    """Names and shapes of the weights in the file."""
    wanted = {
        f'{name}.{CHILD}.{key}': value
        for name, adapter in adapters.items()
        for key, value in adapter.state_dict().items()
    }
    lost = sorted(wanted.keys() - state.keys())
    if lost:
        raise AdapterFileError(
            f'the adapter file is damaged: it lacks {_few(lost)}'
        )
    wanted = {**base, **wanted}
    unknown = sorted(state.keys() - wanted.keys())
    shapes = [
        f'{key} (file {tuple(value.shape)}, model {tuple(wanted[key].shape)})'
        for key, value in state.items()
        if key in wanted and wanted[key].shape != value.shape
    ]
    if unknown or shapes:
        raise AdapterFileError(
            f'what was trained does not fit this model: {len(unknown)} '
            f'entries are unknown to it ({_few(unknown)}), {len(shapes)} have '
            f'another shape ({_few(shapes)}); build it with the config of '
            'the training, its number of classes too'
        )


def _check_layer(model: nn.Module, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise AdapterFileError(
            f'the model has no layer {name}, which the file adapts'
        ) from None


def _signatures(adapters: dict[str, RepAdapter]) -> dict[str, tuple]:
    """What makes the weights of one adapter fit another."""
    return {
        name: (
            a.embed_dims,
            len(a.down_weight),
            a.groups,
            a.channel_dim,
        )
        for name, a in adapters.items()
    }


def _other_adapters(old: dict, new: dict) -> str:
    odd = sorted(old.keys() ^ new.keys())
    what = (
        f'{len(odd)} layers are adapted on one side only: {_few(odd)}'
        if odd
        else 'their hidden_dims or groups differ'
    )
    return (
        f'the model has other adapters than the file: {what}. Take them off '
        '(lors_plugin.adapters.remove_adapters) or inject with the options '
        'of the file'
    )


def _form(entry: str) -> str:
    return entry.rpartition(' ')[0]


def _few(names: list[str], limit: int = 3) -> str:
    dots = ', ...' if len(names) > limit else ''
    return ', '.join(names[:limit]) + dots if names else 'none'
