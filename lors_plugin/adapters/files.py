"""Adapter files: what was trained, and on which base it stands."""

import json
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lors_plugin.checkpoints import load_checkpoint_file

from .file_checks import (
    META,
    VERSION,
    check_adapters,
    check_base,
    check_layers,
    check_trained,
    read,
    same_adapters,
)
from .fingerprint import (
    adapter_keys,
    base_entries,
    digest,
    trained_keys,
    unwrapped,
)
from .inject import (
    AdapterReport,
    adapters_of,
    attach,
    detach,
    report_of,
)

_REPLACED = '_lors_plugin_replaced'


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
    meta, state, adapters = read(checkpoint)
    own = adapter_keys(model)
    base = {k: v for k, v in model.state_dict().items() if k not in own}
    base |= getattr(model, _REPLACED, {})
    check_trained(base, meta, state)
    check_base(base, meta)
    keep = same_adapters(model, adapters)
    if own and not keep and not hasattr(model, _REPLACED):
        check_adapters(model, adapters)
    check_layers(model, adapters)

    remove_adapters(model, keep=keep)
    if not keep:
        attach(model, adapters)
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
