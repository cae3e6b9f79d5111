"""Adapter files: adapters, what was trained with them, and their base.

Every entry of a state dict is either trained or belongs to the base. A file
holds the trained entries, and of the base name, dtype, shape and a hash of the
values of every entry, so that adapters never meet another base. Format:
``state_dict`` and ``meta['lors_plugin_adapter']``, which :func:`adapter_meta`
describes. Files of version 1 and 2 differ in the adapters that they may have.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from lors_plugin.checkpoints import load_checkpoint_file
from lors_plugin.utils import few, unwrapped

from .adapter import Adapter
from .inject import AdapterReport, adapters_of, attach, detach, report_of
from .methods import build_adapter, entries_of, is_adapter_key
from .sites import SiteError, check_called

META = 'lors_plugin_adapter'
# 1 is RepAdapter before one layer; 2 is anything else.
VERSIONS = (1, 2)
_FIELDS = dict(adapters=dict, keys=list, fingerprint=str, base=dict)
_REPLACED = '_lors_plugin_replaced'
# An entry of the base: dtype, shape, start of a SHA-256.
_ENTRY = re.compile(r'\w+ \([\d, ]*\) [0-9a-f]{16}')


class AdapterFileError(ValueError):
    """An adapter file is damaged or belongs to another model."""


class AdapterFile(NamedTuple):
    """The checked content of an adapter file.

    Attributes:
        meta (dict): See :func:`adapter_meta`.
        state (dict[str, Tensor]): The trained entries.
        adapters (dict[str, Adapter]): New adapters that the entries fit,
            by layer; on the meta device.
    """

    meta: dict
    state: dict
    adapters: dict


def is_adapter_checkpoint(checkpoint: Any) -> bool:
    """Tell whether a checkpoint holds adapters without their base."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return isinstance(meta, dict) and META in meta


def adapter_checkpoint(
    model: nn.Module, options: Optional[dict[str, Any]] = None
) -> dict[str, Any]:
    """Make the content of an adapter file; ``save_checkpoint_file`` writes it.

    Args:
        model (nn.Module): An adapted model, wrapped or not.
        options (dict, optional): Of :func:`inject_adapters`, for the record.

    Returns:
        dict: ``state_dict`` with adapters, trained heads and norms, and
        ``meta[META]``, see :func:`adapter_meta`.

    Raises:
        ValueError: If the model has no adapters and nothing is frozen.
    """
    model = unwrapped(model)
    state = entries_of(model)
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
    adapters = {name: a.options() for name, a in adapters_of(model).items()}
    if not adapters and all(p.requires_grad for p in model.parameters()):
        raise ValueError(
            'the model has no adapters and nothing is frozen; '
            'inject_adapters first'
        )
    trained = trained_keys(model)
    base = base_entries(state, trained)
    first = adapters and not any(
        options.keys() & {'type', 'inputs'} for options in adapters.values()
    )
    return dict(
        version=1 if first else 2,
        options=json.loads(json.dumps(options or {})),
        adapters=adapters,
        keys=sorted(trained),
        fingerprint=digest(base),
        base=base,
    )


def load_adapter_checkpoint(
    model: nn.Module, checkpoint: Union[dict, str, Path]
) -> AdapterReport:
    """Put the adapters and the other trained weights of a file on a base.

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
    file = read_adapter_file(checkpoint)
    state = file.state
    own = adapter_keys(model)
    base = {k: v for k, v in entries_of(model).items() if k not in own}
    base |= getattr(model, _REPLACED, {})
    check_trained(base, file)
    check_base(base, file.meta)
    keep = same_adapters(model, file.adapters)
    if own and not keep and not hasattr(model, _REPLACED):
        check_adapters(model, file.adapters)
    check_layers(model, file.adapters)

    remove_adapters(model, keep=keep)
    adapters = None
    if not keep:
        options = file.meta['adapters']
        adapters = {k: build_adapter(v) for k, v in options.items()}
    put_adapters(model, adapters, state)
    return report_of(model)


@torch.no_grad()
def put_adapters(
    model: nn.Module,
    adapters: Optional[dict[str, Adapter]],
    state: dict[str, Tensor],
) -> None:
    """Put adapters and trained weights on a base, and freeze the rest.

    Args:
        model (nn.Module): Of which all was checked; :func:`remove_adapters`
            brings its base back.
        adapters (dict[str, Adapter], optional): By layer; None if the model
            has them.
        state (dict[str, Tensor]): Entries of the adapted model's state dict.
    """
    base = entries_of(model)
    attach(model, adapters or {})
    there = entries_of(model)
    replaced = {
        key: base[key].clone()
        for key in state
        if key in base and not is_adapter_key(key)
    }
    object.__setattr__(model, _REPLACED, replaced)
    for key, value in state.items():
        there[key].copy_(value)
    for key, param in model.named_parameters(remove_duplicate=False):
        param.requires_grad_(key in state or is_adapter_key(key))


def remove_adapters(model: nn.Module, keep: bool = False) -> list[str]:
    """Take adapters off a model and bring its base back, bit for bit.

    Weights that :func:`load_adapter_checkpoint` replaced (head, norms) return;
    those trained since :func:`inject_adapters` stay as trained.

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
        there = entries_of(model)
        with torch.no_grad():
            for key, value in replaced.items():
                there[key].copy_(value)
        object.__delattr__(model, _REPLACED)
    return names


def adapter_keys(model: nn.Module) -> set[str]:
    """Return the entries of the state dict that belong to adapters."""
    return {
        f'{name}.{adapter.child}.{key}'
        for name, adapter in adapters_of(model).items()
        for key in adapter.state_dict()
    }


def trained_keys(model: nn.Module) -> set[str]:
    """Return the entries of the state dict that training changes.

    Adapters, parameters that require gradients, and buffers that go with
    them (statistics of a normalisation): a buffer follows the parameters of
    its own module or, if that has none, of the nearest one around it.

    Args:
        model (nn.Module): An adapted model, not wrapped.
    """
    adapters = adapter_keys(model)
    params = {
        name: param.requires_grad
        for name, param in model.named_parameters(remove_duplicate=False)
        if name not in adapters
    }
    trained = {name for name, trains in params.items() if trains}
    for name in entries_of(model).keys() - params.keys() - adapters:
        prefix = name
        while prefix:
            prefix = prefix.rpartition('.')[0]
            around = [
                trains
                for key, trains in params.items()
                if key.startswith(f'{prefix}.' if prefix else '')
            ]
            if around:
                if any(around):
                    trained.add(name)
                break
    return trained | adapters


def base_entries(
    state: dict[str, Tensor], left_out: Iterable[str], values: bool = True
) -> dict[str, str]:
    """Describe each entry of the base: dtype, shape, start of a SHA-256.

    Args:
        state (dict[str, Tensor]): A state dict.
        left_out (Iterable[str]): Its entries that are trained.
        values (bool): False leaves the SHA-256 out. Defaults to True.

    Returns:
        dict[str, str]: By name, like ``float32 (8, 4) 0123456789abcdef``.
    """
    left_out = set(left_out)
    return {
        name: _describe(name, value, values)
        for name, value in sorted(state.items())
        if name not in left_out and isinstance(value, Tensor)
    }


def digest(entries: dict[str, str]) -> str:
    """Compute one SHA-256 for all entries of a base."""
    lines = [f'{name} {entry}\n' for name, entry in sorted(entries.items())]
    return hashlib.sha256(''.join(lines).encode()).hexdigest()


def fingerprint(
    model: nn.Module, trained: Optional[Iterable[str]] = None
) -> str:
    """Compute a SHA-256 over the names, types, shapes and bits of the base.

    The same with and without adapters, wrappers, and on any device.

    Args:
        model (nn.Module): Adapted or not.
        trained (Iterable[str], optional): Entries of the state dict to leave
            out: ``keys`` of an adapter file, for a model that has no
            adapters yet. By default what is trained in ``model``.
    """
    model = unwrapped(model)
    if trained is None:
        trained = trained_keys(model)
    left_out = {*trained, *adapter_keys(model)}
    return digest(base_entries(entries_of(model), left_out))


def form_of(entry: str) -> str:
    """Return an entry of the base without its SHA-256."""
    return entry[: entry.index(')') + 1]


def read_adapter_file(checkpoint: Any) -> AdapterFile:
    """Check that an adapter checkpoint is whole and consistent.

    No memory is taken that the file does not hold itself, whatever sizes it
    claims.

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
    if version not in VERSIONS:
        raise AdapterFileError(
            f'the adapter file has format version {version!r}, this '
            f'lors_plugin reads versions {VERSIONS}; update lors_plugin or '
            'make the file anew'
        )
    for field, kind in _FIELDS.items():
        if not isinstance(meta.get(field), kind):
            raise _damaged(f'meta[{META!r}] has no {field}')
    if not isinstance(state, dict):
        raise _damaged('it has no state_dict')
    for field in (meta['adapters'], meta['keys'], meta['base'], state):
        for name in field:
            if not isinstance(name, str):
                raise _damaged(f'{name!r} is not the name of a weight')
    for key, entry in meta['base'].items():
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
            raise _damaged(f'it describes {key} of the base as {entry!r}')
    if digest(meta['base']) != meta['fingerprint']:
        raise _damaged('its fingerprint does not fit its list of the base')
    odd = sorted(state.keys() ^ set(meta['keys']))
    if odd or not state:
        raise _damaged(
            f'{len(odd)} of its weights are missing or not listed in its '
            f'meta: {few(odd)}'
        )
    for key, value in state.items():
        if not _is_dense(value):
            raise _damaged(f'{key} is not a dense tensor with values')
    with torch.device('meta'):
        adapters = {k: _build(k, v) for k, v in meta['adapters'].items()}
    for key, value in _states(adapters).items():
        if key not in state or state[key].shape != value.shape:
            raise _damaged(f'it lacks {key}, or in another shape')
        if not state[key].is_floating_point():
            raise _damaged(f'{key} is {state[key].dtype}, not floating point')
    if not adapters and version == 1:
        raise _damaged('it has no adapters')
    return AdapterFile(meta, state, adapters)


def check_trained(base: dict[str, Tensor], file: AdapterFile) -> None:
    """Check that the trained entries of a file fit a model and are finite.

    Args:
        base (dict[str, Tensor]): State dict of the model; its adapters do
            not count.
        file (AdapterFile): The file.

    Raises:
        AdapterFileError: If not.
    """
    layers = tuple(
        f'{name}.{adapter.child}.' for name, adapter in file.adapters.items()
    )
    others = {k: v for k, v in file.state.items() if not k.startswith(layers)}
    unknown = sorted(others.keys() - base.keys())
    forms = [
        f'{key} (file {_form(value)}, model {_form(base[key])})'
        for key, value in others.items()
        if key in base
        and (
            base[key].shape != value.shape
            or base[key].is_floating_point() != value.is_floating_point()
        )
    ]
    if unknown or forms:
        raise AdapterFileError(
            f'the trained weights do not fit this model: {len(unknown)} '
            f'entries are unknown to it ({few(unknown)}), {len(forms)} have '
            f'another shape or type ({few(forms)}); build it with the config '
            'of the training, its number of classes too'
        )
    for key, value in file.state.items():
        if not value.isfinite().all():
            raise _damaged(f'{key} has elements that are not finite')


def check_base(
    state: dict[str, Tensor], meta: dict[str, Any], values: bool = True
) -> None:
    """Check that weights are those that adapters were trained on.

    Args:
        state (dict[str, Tensor]): State dict of the model; entries that the
            file holds itself do not count.
        meta (dict): Of the file, see :func:`adapter_meta`.
        values (bool): False compares names, types and shapes only, for a
            model that has not got its weights yet. Defaults to True.

    Raises:
        AdapterFileError: If not, naming the differences.
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


def check_layers(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Check that a model has the layers that a file adapts.

    Raises:
        AdapterFileError: If not.
    """
    for name, adapter in adapters.items():
        try:
            check_called(model, name)
            adapter.check(model.get_submodule(name))
        except (AttributeError, SiteError) as error:
            raise AdapterFileError(
                f'the file adapts {name}, which this model cannot: {error}'
            ) from None


def same_adapters(model: nn.Module, adapters: dict[str, Adapter]) -> bool:
    """Tell whether a model has just such adapters."""
    return _signatures(adapters_of(model)) == _signatures(adapters)


def check_adapters(model: nn.Module, adapters: dict[str, Adapter]) -> None:
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


def _describe(name: str, value: Tensor, values: bool) -> str:
    if not values:
        return _form(value)
    if value.is_meta or hasattr(value, 'placements'):
        raise ValueError(
            f'{name} is sharded or on the meta device; gather or load the '
            'weights before their fingerprint is taken'
        )
    plain = value.detach().cpu().contiguous()
    bits = plain.reshape(-1).view(torch.uint8).numpy()
    return f'{_form(value)} {hashlib.sha256(bits).hexdigest()[:16]}'


def _form(value: Tensor) -> str:
    return f'{str(value.dtype).removeprefix("torch.")} {tuple(value.shape)}'


def _is_dense(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def _damaged(what: str) -> AdapterFileError:
    return AdapterFileError(f'the adapter file is damaged: {what}')


def _build(name: str, options: Any) -> Adapter:
    try:
        return build_adapter(options)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise _damaged(f'adapter of {name}: {error}') from error


def _states(adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    return {
        f'{name}.{adapter.child}.{key}': value
        for name, adapter in adapters.items()
        for key, value in adapter.state_dict().items()
    }


def _signatures(adapters: dict[str, Adapter]) -> dict[str, tuple]:
    """Describe the shapes and layouts of adapters."""
    return {name: a.signature() for name, a in adapters.items()}
