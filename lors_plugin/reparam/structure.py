"""Build a model as it was trained: structure by config, weights by files."""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Optional

from torch import Tensor, nn

from lors_plugin.adapters import (
    AdapterFileError,
    PeftError,
    adapters_of,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
    load_peft,
    read_peft,
)
from lors_plugin.adapters.adapter import Adapter
from lors_plugin.adapters.hook import RepAdapterHook
from lors_plugin.adapters.inject import attach
from lors_plugin.adapters.methods import (
    ADAPTERS,
    is_adapter_key,
    names_in_files,
)
from lors_plugin.adapters.peft import lora_of
from lors_plugin.build import build_model, structure_hooks, without_adapters
from lors_plugin.utils import few, part_of

# An entry of an adapter: its layer, the adapter's name there, and the rest.
_ENTRY = re.compile(
    rf'(.+)\.({"|".join(kind.child for kind in ADAPTERS.values())})\.(.+)'
)


class CheckpointError(ValueError):
    """A checkpoint does not belong to the model of the config."""


def build_base(cfg: dict) -> nn.Module:
    """Build the model of a config without adapters, in evaluation mode.

    Args:
        cfg (Config | dict): The whole config.

    Returns:
        nn.Module: On the CPU; no pretrained weights are loaded.
    """
    return build_model(cfg, adapters=False).eval()


def trained_model(
    base: nn.Module,
    cfg: dict,
    content: dict,
    state: dict[str, Tensor],
    path: Any,
    scale: Optional[float] = None,
) -> nn.Module:
    """Load a whole checkpoint.

    Args:
        base (nn.Module): From :func:`build_base`; changed in place.
        cfg (Config | dict): The config of the training.
        content (dict): The checkpoint.
        state (dict[str, Tensor]): Its weights.
        path (Any): Its file, for messages.
        scale (float, optional): See :func:`adapt`.

    Returns:
        nn.Module: The base with adapters, if it was trained with them.
    """
    if is_adapter_checkpoint(content):
        raise CheckpointError(
            f'{path} holds adapters without their base; merge it by '
            f'CONFIG OUT_DIR --adapter {path} --base BASE'
        )
    if has_adapters(state) or asks_for_adapters(cfg):
        adapt(base, cfg, state, scale)
    load_whole(base, state, path)
    return base


def adapted_model(
    base: nn.Module,
    cfg: dict,
    content: dict,
    state: dict[str, Tensor],
    path: Any,
    base_state: dict[str, Tensor],
    base_path: Any,
    scale: Optional[float] = None,
) -> tuple[nn.Module, bool]:
    """Load adapters from a file of their own, and the base they belong to.

    Args:
        base (nn.Module): From :func:`build_base`; not changed.
        cfg (Config | dict): The config of the training.
        content (dict): The adapter file.
        state (dict[str, Tensor]): Its weights.
        path (Any): Its name, for messages.
        base_state (dict[str, Tensor]): Weights of the base.
        base_path (Any): Their file, for messages.
        scale (float, optional): See :func:`adapt`.

    Returns:
        tuple: The adapted model, and whether the file proves that it was
        trained on this base.
    """
    model = deepcopy(base)
    if is_adapter_checkpoint(content):
        check_scale(state, scale)
        load_base(model, base_state, _in_files(model, state), base_path)
        try:
            load_adapter_checkpoint(model, dict(content, state_dict=state))
        except AdapterFileError as error:
            # Of several files, which one?
            raise CheckpointError(f'{path}: {error}') from error
        return model.eval(), True
    if not has_adapters(state):
        raise CheckpointError(
            f'--adapter {path} holds no adapters; keys have to look like '
            'LAYER.rep_adapter.conv_A.weight (--rename helps), and are '
            f'like {list(state)[:2]}'
        )
    load_base(model, base_state, list(state), base_path)
    adapt(model, cfg, state, scale)
    own = model.state_dict()
    # The original layout splits differently; loading reads it.
    lacking = {k: v for k, v in own.items() if not is_adapter_key(k)}
    load_whole(model, {**lacking, **state}, path)
    for key, param in model.named_parameters():
        param.requires_grad_(key in state or is_adapter_key(key))
    return model, False


def peft_model(
    base: nn.Module,
    folder: Any,
    base_state: dict[str, Tensor],
    base_path: Any,
    part: str = '',
) -> nn.Module:
    """Load a LoRA from a folder of PEFT, and the base it belongs to.

    Args:
        base (nn.Module): From :func:`build_base`; not changed.
        folder (Any): Of PEFT.
        base_state (dict[str, Tensor]): Weights of the base.
        base_path (Any): Their file, for messages.
        part (str): The part of the model that PEFT had.

    Returns:
        nn.Module: The adapted model, in evaluation mode.
    """
    model, adapter = deepcopy(base), read_peft(folder)
    try:
        entries = lora_of(part_of(model, part), adapter)[1]
    except PeftError as error:
        raise CheckpointError(f'{folder}: {error}') from error
    prefix = f'{part}.' if part else ''
    own = _in_files(model, [prefix + key for key in entries])
    load_base(model, base_state, own, base_path)
    load_peft(model, adapter, part)
    return model.eval()


def adapt(
    model: nn.Module,
    cfg: dict,
    state: dict[str, Tensor],
    scale: Optional[float] = None,
) -> None:
    """Inject the adapters that a config or else a file has.

    Args:
        model (nn.Module): Without adapters.
        cfg (Config | dict): Its ``RepAdapterHook`` is followed where there
            is one.
        state (dict[str, Tensor]): Weights with adapters.
        scale (float, optional): For files of the original layout, which
            hold none; by default the hook's.
    """
    check_scale(state, scale)
    for hook in structure_hooks(cfg):
        if isinstance(hook, RepAdapterHook):
            if scale is not None:
                hook.options['scale'] = scale
            hook.change(model)
    if not adapters_of(model):
        attach(model, _adapters_in(state, model, scale))
    model.eval()


def asks_for_adapters(cfg: dict) -> bool:
    """Return whether a hook or the model of a config brings adapters."""
    hooks = structure_hooks(cfg)
    return without_adapters(cfg['model']) != cfg['model'] or any(
        isinstance(hook, RepAdapterHook) for hook in hooks
    )


def _adapters_in(
    state: dict[str, Tensor], model: nn.Module, scale: Optional[float]
) -> dict[str, Adapter]:
    """Build adapters from the shapes of their weights."""
    states: dict[tuple, dict[str, Tensor]] = {}
    for match in filter(None, map(_ENTRY.fullmatch, state)):
        states.setdefault(match.group(1, 2), {})[match[3]] = state[match[0]]
    kinds = {kind.child: kind for kind in ADAPTERS.values()}
    adapters = {}
    for (name, child), own in states.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f'the file adapts {name}, and the model has no such layer'
            ) from None
        try:
            adapters[name] = kinds[child].from_state(layer, own, scale)
        except KeyError as error:
            raise CheckpointError(
                f'the adapter of {name} lacks its {error}'
            ) from None
        except ValueError as error:
            raise CheckpointError(
                f'the adapter of {name} {error}; give --scale, as it was '
                'trained'
                if 'scale' in str(error)
                else f'the adapter of {name}: {error}'
            ) from None
    return adapters


def check_scale(state: dict[str, Tensor], scale: Optional[float]) -> None:
    """Refuse a scale for adapters that have their own."""
    own = [k for k in state if k.endswith('.scale') and is_adapter_key(k)]
    if own and scale is not None:
        raise CheckpointError(
            '--scale is for files of the original layout, and this one has '
            f'{own[0]}={float(state[own[0]]):g} and others; leave it out'
        )


def has_adapters(state: dict[str, Tensor]) -> bool:
    """Return whether a state dict has weights of adapters."""
    return any(map(is_adapter_key, state))


def rename(
    state: dict[str, Tensor], pairs: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    """Rename the keys of another program.

    Args:
        state (dict[str, Tensor]): A state dict.
        pairs (Sequence[tuple]): Regular expression and replacement, as for
            :func:`re.sub`, one after the other.

    Returns:
        dict[str, Tensor]: The same tensors.
    """
    for pattern, replacement in pairs:
        if not any(re.search(pattern, key) for key in state):
            raise CheckpointError(
                f'--rename {pattern!r} finds nothing in keys like '
                f'{list(state)[:2]}'
            )
        state = {re.sub(pattern, replacement, k): v for k, v in state.items()}
    return state


def load_whole(model: nn.Module, state: dict[str, Tensor], path: Any) -> None:
    """Load weights that must be complete and finite.

    Args:
        model (nn.Module): Any model.
        state (dict[str, Tensor]): Its weights.
        path (Any): Where they come from, for messages.
    """
    broken = [k for k, v in state.items() if not _finite(v)]
    if broken:
        raise CheckpointError(
            f'{path}: {len(broken)} weights have values that are not finite, '
            f'{broken[0]} among them; did the training diverge?'
        )
    try:
        found = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f'{path} does not fit the model of the config: {error}'
        ) from error
    if found.missing_keys or found.unexpected_keys:
        raise CheckpointError(
            f'{path} does not fit the model of the config: it lacks '
            f'{_numbered(found.missing_keys)}, and the model does not know '
            f'{_numbered(found.unexpected_keys)} of it. Use the config that '
            'it was trained with'
        )


def load_base(
    model: nn.Module,
    state: dict[str, Tensor],
    replaced: Sequence[str],
    path: Any,
) -> None:
    """Load the weights that adapters were trained on.

    Args:
        model (nn.Module): Without adapters.
        state (dict[str, Tensor]): Of the whole model, or of its backbone
            alone as files of pretrained weights have it.
        replaced (Sequence[str]): Keys that the adapter file brings itself.
        path (Any): Where the weights come from, for messages.
    """
    names = model.state_dict().keys()
    if not names & state.keys():
        state = {f'backbone.{key}': value for key, value in state.items()}
    wanted = {
        key: value
        for key, value in state.items()
        if key in names and key not in replaced
    }
    missing = sorted(names - wanted.keys() - set(replaced))
    if missing:
        raise CheckpointError(
            f'--base {path} lacks {_numbered(missing)} of the model, which '
            'the adapter file does not bring either'
        )
    own = model.state_dict()
    load_whole(
        model, {**{key: own[key] for key in names}, **wanted}, f'--base {path}'
    )


def _in_files(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Return the names that entries of a model have in its state dict."""
    names = names_in_files(model)
    return [names.get(key, key) for key in keys]


def _finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(value.isfinite().all())


def _numbered(names: Sequence[str]) -> str:
    return f'{len(names)} ({few(names)})' if names else 'nothing'
