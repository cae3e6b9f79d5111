"""Is an adapter file whole, and does it belong to a model?"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .fingerprint import base_entries, digest, form_of
from .inject import CHILD, adapters_of
from .rep_adapter import RepAdapter
from .sites import SiteError, site_of

META = 'lors_plugin_adapter'
VERSION = 1
_FIELDS = dict(adapters=dict, keys=list, fingerprint=str, base=dict)


class AdapterFileError(ValueError):
    """An adapter file is damaged or belongs to another model."""


def is_adapter_checkpoint(checkpoint: Any) -> bool:
    """Whether a checkpoint holds adapters without their base."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return isinstance(meta, dict) and META in meta


def read(
    checkpoint: dict,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, RepAdapter]]:
    """Check that an adapter checkpoint is whole.

    Returns:
        tuple[dict]: What :func:`adapter_meta` said, the weights, and new
        adapters that they fit, by layer.

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
    for field, kind in _FIELDS.items():
        if not isinstance(meta.get(field), kind):
            raise _damaged(f'meta[{META!r}] has no {field}')
    keys = set(state) if isinstance(state, dict) else set()
    odd = sorted(keys ^ set(meta['keys']))
    if odd or not keys:
        raise _damaged(
            f'{len(odd)} of its weights are missing or not listed in its '
            f'meta: {few(odd)}'
        )
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.isfinite().all():
            raise _damaged(f'{key} has numbers that are not finite')
    if digest(meta['base']) != meta['fingerprint']:
        raise _damaged('its fingerprint does not fit its list of the base')
    adapters = {name: _build(name, a) for name, a in meta['adapters'].items()}
    wanted = _states(adapters)
    wrong = [k for k, v in wanted.items() if _shape(state, k) != v.shape]
    if wrong or not wanted:
        raise _damaged(f'it lacks {few(wrong)}, or in another shape')
    return meta, state, adapters


def check_trained(
    base: dict[str, Tensor], meta: dict[str, Any], state: dict[str, Tensor]
) -> None:
    """Check that a model has the other weights of a file, in their shapes.

    Args:
        base (dict[str, Tensor]): State dict of the model; what it says of
            adapters does not count.
        meta (dict): Of the file.
        state (dict[str, Tensor]): Weights in the file.

    Raises:
        AdapterFileError: If not.
    """
    layers = tuple(f'{name}.{CHILD}.' for name in meta['adapters'])
    others = {k: v for k, v in state.items() if not k.startswith(layers)}
    unknown = sorted(others.keys() - base.keys())
    shapes = [
        f'{key} (file {tuple(value.shape)}, model {tuple(base[key].shape)})'
        for key, value in others.items()
        if key in base and base[key].shape != value.shape
    ]
    if unknown or shapes:
        raise AdapterFileError(
            f'what was trained does not fit this model: {len(unknown)} '
            f'entries are unknown to it ({few(unknown)}), {len(shapes)} have '
            f'another shape ({few(shapes)}); build it with the config of '
            'the training, its number of classes too'
        )


def check_base(
    state: dict[str, Tensor], meta: dict[str, Any], values: bool = True
) -> None:
    """Check that weights are those that adapters were trained on.

    Args:
        state (dict[str, Tensor]): State dict of the model; what the file
            holds itself does not count.
        meta (dict): Of the file, as :func:`adapter_meta` gave it.
        values (bool): False compares names, types and shapes only, for a
            model that has not got its weights yet. Defaults to True.

    Raises:
        AdapterFileError: If not, naming what differs.
    """
    here, there = base_entries(state, meta['keys'], values), meta['base']
    if not values:
        there = {key: form_of(entry) for key, entry in there.items()}
    if here == there:
        return
    lacking = sorted(there.keys() - here.keys())
    extra = sorted(here.keys() - there.keys())
    both = sorted(here.keys() & there.keys())
    other = [k for k in both if here[k] != there[k]]
    form = [
        f'{k} (file {form_of(there[k])}, model {form_of(here[k])})'
        for k in other
        if form_of(here[k]) != form_of(there[k])
    ]
    lines = ['these adapters were trained on another base:']
    if lacking or extra:
        lines.append(
            f'  the model lacks {len(lacking)} of its entries '
            f'({few(lacking)}) and has {len(extra)} others ({few(extra)}); '
            'its architecture, depth perhaps, is another'
        )
    if form:
        lines.append(f'  {len(form)} have another shape or type: {few(form)}')
    elif other:
        lines.append(
            f'  {len(other)} of {len(both)} entries have other values: '
            f'{few(other)}. Load the weights of the base first (init_cfg or '
            'the checkpoint that training began with)'
        )
    raise AdapterFileError('\n'.join(lines))


def check_layers(model: nn.Module, adapters: dict[str, RepAdapter]) -> None:
    """Check that a model has the layers that a file adapts.

    Raises:
        AdapterFileError: If not.
    """
    for name, adapter in adapters.items():
        try:
            site = site_of(model.get_submodule(name))
        except (AttributeError, SiteError) as error:
            raise AdapterFileError(
                f'the file adapts {name}, which this model cannot: {error}'
            ) from None
        if site != (adapter.embed_dims, adapter.channel_dim):
            raise AdapterFileError(
                f'{name} has {site.channels} channels, its adapter in the '
                f'file {adapter.embed_dims}'
            )


def same_adapters(model: nn.Module, adapters: dict[str, RepAdapter]) -> bool:
    """Whether a model has just such adapters."""
    return _signatures(adapters_of(model)) == _signatures(adapters)


def check_adapters(model: nn.Module, adapters: dict[str, RepAdapter]) -> None:
    """Check that a model has just such adapters.

    Raises:
        AdapterFileError: If not.
    """
    if same_adapters(model, adapters):
        return
    odd = sorted(adapters_of(model).keys() ^ adapters.keys())
    what = (
        f'{len(odd)} layers are adapted on one side only: {few(odd)}'
        if odd
        else 'their hidden_dims or groups differ'
    )
    raise AdapterFileError(
        f'the model has other adapters than the file: {what}. Take them off '
        '(lors_plugin.adapters.remove_adapters) or inject with the options '
        'of the file'
    )


def few(names: list[str], limit: int = 3) -> str:
    """The first few names as text."""
    dots = ', ...' if len(names) > limit else ''
    return ', '.join(names[:limit]) + dots if names else 'none'


def _damaged(what: str) -> AdapterFileError:
    return AdapterFileError(f'the adapter file is damaged: {what}')


def _build(name: str, options: dict) -> RepAdapter:
    try:
        return RepAdapter(**options)
    except (TypeError, ValueError) as error:
        raise _damaged(f'adapter of {name}: {error}') from error


def _states(adapters: dict[str, RepAdapter]) -> dict[str, Tensor]:
    return {
        f'{name}.{CHILD}.{key}': value
        for name, adapter in adapters.items()
        for key, value in adapter.state_dict().items()
    }


def _shape(state: dict[str, Tensor], key: str) -> Optional[torch.Size]:
    return state[key].shape if key in state else None


def _signatures(adapters: dict[str, RepAdapter]) -> dict[str, tuple]:
    """What makes the weights of one adapter fit another."""
    return {
        name: (a.embed_dims, len(a.down_weight), a.groups, a.channel_dim)
        for name, a in adapters.items()
    }
