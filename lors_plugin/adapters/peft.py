"""Folders of PEFT: adapters written for it, and its LoRA read.

An adapter ``x + s (U (D x + b_D) + b_U)`` in front of a linear layer with the
weight ``W`` is a LoRA beside it: ``A = D``, ``B = W U``, ``r`` the hidden
channels, ``lora_alpha = s r``, and ``W (U b_D + b_U)`` for a bias of ``B``
(``lora_bias``, PEFT 0.14). A convolution of k x k needs ``r k^2`` rows. PEFT
itself is not needed here: a folder is JSON and safetensors.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from lors_plugin.checkpoints.files import (
    checkpoint_writer,
    read_weights,
    write_all,
)
from lors_plugin.utils import check_pattern, few, part_of, unwrapped

from .adapter import Adapter, RepAdapter
from .checkpoint import fingerprint, put_adapters, trained_keys
from .inject import AdapterReport, adapters_of, report_of
from .lora import LoRA
from .methods import entries_of, fits_pattern
from .sites import SiteError, check_called, site_of

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
CARD = 'README.md'
_PREFIX = 'base_model.model.'
# Fields of a LoRA's config that are read, or say nothing about its outputs.
_KNOWN = {
    'alpha_pattern', 'auto_mapping', 'base_model_name_or_path', 'bias',
    'ensure_weight_tying', 'exclude_modules', 'eva_config', 'inference_mode',
    'init_lora_weights', 'layers_pattern', 'layers_to_transform',
    'lora_alpha', 'lora_bias', 'lora_dropout', 'loftq_config',
    'megatron_core', 'modules_to_save', 'peft_type', 'peft_version',
    'qalora_group_size', 'r', 'rank_pattern', 'revision', 'runtime_config',
    'target_modules', 'task_type', 'use_rslora',
}  # fmt: skip
# Other ways to start change the base, which the file does not hold.
_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
# With `bias='all'` modules_to_save are written by these names, too.
_WRAPPED = re.compile(r'\.(?:original_module|modules_to_save)\.')
_LORA_KEY = re.compile(r'(.+)\.lora_(A|B)\.(?:default\.)?(weight|bias)')


class PeftError(ValueError):
    """PEFT cannot hold these adapters, or its folder cannot be read."""


@dataclass
class PeftAdapter:
    """The content of a folder of PEFT.

    Attributes:
        config (dict): Of ``adapter_config.json``.
        state (dict[str, Tensor]): Of ``adapter_model.safetensors``.
        notes (list[str]): What a user has to know about it.
        fingerprint (str): Of the base, '' if unknown.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ''


class Update(NamedTuple):
    """A low-rank update of a layer, in float64.

    Attributes:
        A (Tensor): Shape (r, in), or (r, in, h, w) of a convolution.
        B (Tensor): Shape (out, r).
        bias (Tensor, optional): Shape (out, ); None where none is needed.
        scale (float): Of all three: ``W + scale * B A``.
    """

    A: Tensor
    B: Tensor
    bias: Optional[Tensor]
    scale: float


@torch.no_grad()
def to_peft(
    model: nn.Module,
    part: str = '',
    base_name: Optional[str] = None,
    dtype: torch.dtype = torch.float32,
) -> PeftAdapter:
    """Write the adapters of a model as a LoRA of PEFT.

    Args:
        model (nn.Module): Adapted, with the weights of its base; not changed.
        part (str): The part of it that PEFT will get; names of layers are
            those inside of it, and what was trained outside is left out.
            Defaults to the whole model.
        base_name (str, optional): Name on the Hub or path of the base, for
            ``base_model_name_or_path``.
        dtype (torch.dtype): Of the weights, which are computed in float64
            and rounded once. Defaults to torch.float32.

    Returns:
        PeftAdapter: With it, ``PeftModel.from_pretrained`` makes the base
        compute what the adapted model does. Other weights that were trained
        inside of the part are in ``modules_to_save``.

    Raises:
        PeftError: If PEFT cannot express it; the message names the layer.
    """
    model = unwrapped(model)
    host = part_of(model, part)
    updates = _updates_of(model, host, part)
    trained = trained_keys(model)
    saved, left_out = _modules_to_save(model, host, part, trained, updates)
    notes = []
    if left_out:
        notes.append(
            f'left out are {len(left_out)} trained weights outside of '
            f'{part}: {few(left_out)}'
        )
    biased = any(_is_needed(update.bias) for update in updates.values())
    unmergeable = [
        name for name in updates if host.get_submodule(name).bias is None
    ]
    if biased and unmergeable:
        notes.append(
            f'PEFT runs these adapters and cannot merge {len(unmergeable)} '
            f'of them, whose layers have no bias: {few(unmergeable)}'
        )
    state = {}
    for name, update in updates.items():
        conv = isinstance(host.get_submodule(name), nn.Conv2d)
        key = f'{_PREFIX}{name}.lora'
        state[f'{key}_A.weight'] = update.A
        state[f'{key}_B.weight'] = (
            update.B[..., None, None] if conv else update.B
        )
        if biased:
            zeros = update.B.new_zeros(len(update.B))
            shift = zeros if update.bias is None else update.bias
            state[f'{key}_B.bias'] = shift
    for name in saved:
        for key, value in host.get_submodule(name).state_dict().items():
            state[f'{_PREFIX}{name}.{key}'] = value
    state = {key: _rounded(key, value, dtype) for key, value in state.items()}
    config = _config_of(updates, host, saved, biased, base_name)
    return PeftAdapter(config, state, notes, fingerprint(model, trained))


def write_peft(adapter: PeftAdapter, folder: Union[str, Path]) -> None:
    """Write a folder: config, weights and a model card, all or none.

    Args:
        adapter (PeftAdapter): From :func:`to_peft`.
        folder (str | Path): Files of these names in it are replaced.

    Raises:
        OSError: If they cannot be written; all are as they were before.
    """
    texts = {
        CONFIG: json.dumps(adapter.config, indent=2) + '\n',
        CARD: model_card(adapter),
    }
    folder = Path(folder)
    writers: dict[Path, Callable] = {
        folder / name: lambda path, text=text: path.write_text(text, 'utf-8')
        for name, text in texts.items()
    }
    meta = dict(fingerprint=adapter.fingerprint)
    writers[folder / WEIGHTS] = checkpoint_writer(
        WEIGHTS, dict(meta=meta, state_dict=adapter.state)
    )
    write_all(writers)


def read_peft(folder: Union[str, Path]) -> PeftAdapter:
    """Read a folder that PEFT or :func:`write_peft` wrote.

    Args:
        folder (str | Path): With ``adapter_config.json`` and
            ``adapter_model.safetensors``; pickled weights are not read.

    Returns:
        PeftAdapter: Its content, checked.

    Raises:
        PeftError: If it is no LoRA, or has what this package does not.
        ConversionError: If the weights cannot be read; a ``ValueError``.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise PeftError(f'{folder} is no folder of PEFT: it has no {CONFIG}')
    try:
        config = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise PeftError(f'{path} is no JSON: {error}') from None
    if not isinstance(config, dict):
        raise PeftError(f'{path} holds no fields')
    if not (folder / WEIGHTS).is_file():
        pickled = list(folder.glob('adapter_model.*'))
        hint = ''
        if pickled:
            hint = (
                f'; {pickled[0].name} could run code while it is read, so '
                'save the adapters anew by save_pretrained of PEFT'
            )
        raise PeftError(f'{folder} has no {WEIGHTS}{hint}')
    try:
        _check_config(config)
    except PeftError as error:
        raise PeftError(f'{path}: {error}') from None
    return PeftAdapter(config, read_weights(folder / WEIGHTS))


def load_peft(
    model: nn.Module,
    adapter: Union[PeftAdapter, str, Path],
    part: str = '',
) -> AdapterReport:
    """Put the LoRA of a folder of PEFT on its base.

    Everything is checked before the first weight is written. The model is
    then one with adapters like any other: it runs, trains, is merged and
    saved as adapter file; ``remove_adapters`` brings the base back. What the
    folder holds is trainable, all else frozen.

    Args:
        model (nn.Module): With the weights of the base, without adapters.
        adapter (PeftAdapter | str | Path): The folder or its content.
        part (str): The part of the model that PEFT had. Defaults to all.

    Returns:
        AdapterReport: Layers and counts.

    Raises:
        PeftError: If it does not fit the model; nothing is changed then.
    """
    model = unwrapped(model)
    if adapters_of(model):
        raise PeftError(
            'the model has adapters already; merge them or take them off '
            '(lors_plugin.adapters.remove_adapters) first'
        )
    adapters, entries = lora_of(part_of(model, part), adapter)
    prefix = f'{part}.' if part else ''
    put_adapters(
        model,
        {prefix + name: value for name, value in adapters.items()},
        {prefix + key: value for key, value in entries.items()},
    )
    return report_of(model)


def lora_of(
    host: nn.Module, adapter: Union[PeftAdapter, str, Path]
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """Make the adapters that a folder of PEFT describes.

    Args:
        host (nn.Module): What PEFT calls the base model; not changed.
        adapter (PeftAdapter | str | Path): The folder or its content.

    Returns:
        tuple: Adapters by layer, with their weights, and other entries of
        the host's state dict that were trained with them.

    Raises:
        PeftError: If they do not fit the host.
    """
    if not isinstance(adapter, PeftAdapter):
        adapter = read_peft(adapter)
    config = adapter.config
    parts: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, Tensor] = {}
    for key, value in adapter.state.items():
        name = key.removeprefix(_PREFIX)
        plain = _WRAPPED.sub('.', name)
        if plain != name and _PREFIX + plain in adapter.state:
            continue
        match = _LORA_KEY.fullmatch(name)
        if match:
            parts.setdefault(match[1], {})[f'{match[2]}.{match[3]}'] = value
        elif '.lora_' in name:
            raise PeftError(
                f'{key} is no weight of a plain LoRA (a linear layer or a '
                'convolution)'
            )
        else:
            # Of an adapted layer, with `bias='all'` or 'lora_only'.
            entries[name.replace('.base_layer.', '.')] = value
    if not parts:
        raise PeftError('the weights of the folder have no LoRA')
    _check_names(host, config, list(parts))
    own = entries_of(host)
    odd = [
        f'{key} {tuple(value.shape)}'
        for key, value in entries.items()
        if key not in own or own[key].shape != value.shape
    ]
    if odd:
        raise PeftError(
            f'{len(odd)} weights beside the LoRA are none of this model, or '
            f'have another shape: {few(odd)}; build it as it was trained, '
            'with its number of classes, or give the part that was'
        )
    adapters = {}
    for name, part in parts.items():
        try:
            adapters[name] = _lora_from(host, name, part, config)
        except ValueError as error:
            raise PeftError(f'{name}: {error}') from None
    return adapters, entries


def model_card(adapter: PeftAdapter) -> str:
    """Write the model card of a folder."""
    config = adapter.config
    base = config.get('base_model_name_or_path')
    head = ['---', 'library_name: peft']
    head += [f'base_model: {base}'] if base else []
    head += ['tags:', '- lora', '- rep-adapter', '---']
    layers = sorted(_layers(adapter.state))
    saved = config.get('modules_to_save') or ['none']
    lines = [
        f'- {len(layers)} layers, {layers[0]} to {layers[-1]}',
        f'- r {config["r"]}, lora_alpha {config["lora_alpha"]}; others for '
        f'{len(config.get("rank_pattern") or ())} and '
        f'{len(config.get("alpha_pattern") or ())} layers',
        f'- modules trained with them: {", ".join(saved)}',
        f'- SHA-256 of the frozen weights: `{adapter.fingerprint or "?"}`',
        *(f'- {note}' for note in adapter.notes),
    ]
    return CARD_TEXT.format(head='\n'.join(head), lines='\n'.join(lines))


CARD_TEXT = """{head}

# Adapters

Written by lors_plugin as a LoRA of PEFT. On the model with the weights
that they were trained on, outputs are those of the adapted model:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, 'this folder')
model.eval()
```

{lines}

Add here what they were trained for, on which data, how well they do, and
under which licence they may be used.
"""


def _updates_of(
    model: nn.Module, host: nn.Module, part: str
) -> dict[str, Update]:
    """Compute the LoRA of every adapted layer, by its name in the host."""
    adapters = adapters_of(model)
    if not adapters:
        raise PeftError(
            "the model has no adapters. What method='bitfit', 'norm' and "
            "'linear_probe' train are weights of the model itself; merge "
            'them instead'
        )
    outside = [
        name for name in adapters if part and not name.startswith(f'{part}.')
    ]
    if outside or '' in adapters:
        raise PeftError(
            f'{outside[0] if outside else "the model itself"} is adapted, '
            f'and PEFT adapts layers inside of {part or "a model"} only; give '
            'a part around all adapters'
        )
    names: dict[int, list[str]] = {}
    for name, module in host.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    updates = {}
    for name, adapter in adapters.items():
        try:
            layers = low_rank(model.get_submodule(name), adapter)
            for layer, update in layers.items():
                own = names[id(layer)][0]
                places = _by_parent(host, names[id(layer)])
                if len(places) > 1:
                    raise PeftError(
                        f'it is {places[1]} too, and PEFT would adapt only '
                        'one of both; merge it instead'
                    )
                _check_layer(layer)
                if layer.bias is None and _is_needed(update.bias):
                    what = 'it' if name.endswith(own) else own
                    raise PeftError(
                        f'{what} has no bias, and the adapter gives it one, '
                        'which PEFT could never merge; merge it instead '
                        '(CONFIG OUT_DIR --adapter FILE --base BASE), leave '
                        "the layer out of training, or use method='lora'"
                    )
                updates[own] = update
        except (PeftError, SiteError) as error:
            raise PeftError(f'{name}: {error}') from None
    return updates


def _by_parent(host: nn.Module, names: list[str]) -> list[str]:
    """Choose one name of a module per module that has it as a child."""
    parents = (host.get_submodule(name.rpartition('.')[0]) for name in names)
    return list({id(p): name for p, name in zip(parents, names)}.values())


def low_rank(layer: nn.Module, adapter: Adapter) -> dict[nn.Module, Update]:
    """Write an adapter as low-rank updates of the layers that it changes.

    Args:
        layer (nn.Module): The adapted layer.
        adapter (Adapter): Its adapter.

    Returns:
        dict[nn.Module, Update]: By linear layer or convolution.

    Raises:
        PeftError: If it changes others than these.
    """
    if isinstance(adapter, LoRA):
        bias = None if adapter.bias is None else adapter.bias.double()
        scale = adapter.scale.item()
        A, B = adapter.A.double(), adapter.B.double()
        return {layer: Update(A, B, bias, scale)}
    if not isinstance(adapter, RepAdapter):
        raise PeftError(f'{adapter.method} is no low-rank update')
    site = site_of(layer, adapter.inputs)
    readers = [reader.module for reader in site.readers()]
    if not all(isinstance(m, (nn.Linear, nn.Conv2d)) for m in readers):
        raise PeftError(
            f'{type(layer).__name__} reads its projections without calling '
            'them, so a LoRA of PEFT has no place for this adapter; merge it '
            'instead (CONFIG OUT_DIR --adapter FILE --base BASE)'
        )
    down, up = adapter.down_weight.double(), adapter._dense_up().double()
    offset = up @ adapter.down_bias.double() + adapter.up_bias.double()
    # What absorbs x @ matrix + offset does so for any rows of the matrix.
    absorbed = site.absorb(up.T, offset)
    biases = {m: value for m, name, value in absorbed if name == 'bias'}
    updates = {}
    for module, name, B in absorbed:
        if name != 'weight':
            continue
        shift = biases.get(module)
        if shift is not None and module.bias is not None:
            shift = shift - module.bias.double()
        A = down
        if isinstance(module, nn.Conv2d):
            A, B = _per_position(down, B)
        updates[module] = Update(A, B, shift, adapter.scale.item())
    return updates


def _per_position(down: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Spread ``down`` over the positions of a kernel.

    Args:
        down (Tensor): Shape (c, in).
        B (Tensor): Shape (out, c, h, w), another matrix per position.

    Returns:
        tuple[Tensor]: ``A`` (h w c, in, h, w) and ``B`` (out, h w c).
    """
    _, _, height, width = B.shape
    A = down.new_zeros(height, width, *down.shape, height, width)
    for y in range(height):
        for x in range(width):
            A[y, x, :, :, y, x] = down
    return A.flatten(0, 2), B.permute(0, 2, 3, 1).flatten(1)


def _check_layer(layer: nn.Module) -> None:
    """Refuse convolutions whose options PEFT's LoRA does not take over."""
    if not isinstance(layer, nn.Conv2d):
        return
    if max(layer.dilation) > 1 and max(layer.kernel_size) > 1:
        raise PeftError(
            f'PEFT ignores the dilation {layer.dilation} of a convolution'
        )
    padded = layer.padding != 'valid' and any(layer.padding)
    if layer.padding_mode != 'zeros' and padded:
        raise PeftError(
            f'PEFT ignores padding_mode={layer.padding_mode!r} of a '
            'convolution'
        )


def _is_needed(bias: Optional[Tensor]) -> bool:
    return bias is not None and bool(bias.any())


def _modules_to_save(
    model: nn.Module,
    host: nn.Module,
    part: str,
    trained: set[str],
    updates: dict[str, Update],
) -> tuple[list[str], list[str]]:
    """Find the modules that PEFT has to save as a whole.

    Args:
        model (nn.Module): The whole model.
        host (nn.Module): The part of it that PEFT gets.
        part (str): Its name.
        trained (set[str]): Entries of the state dict that are trained.
        updates (dict): By the names of the adapted layers in the host.

    Returns:
        tuple: Names in the host, and entries that are outside of it.
    """
    prefix = f'{part}.' if part else ''
    inside = {
        f'{name}.{adapter.child}.'
        for name, adapter in adapters_of(model).items()
    }
    others = sorted(k for k in trained if not k.startswith(tuple(inside)))
    left_out = [key for key in others if not key.startswith(prefix)]
    owners: dict[str, str] = {}
    for key in others:
        if key.startswith(prefix):
            name = key.removeprefix(prefix).rpartition('.')[0]
            owners.setdefault(name, key)
    # PEFT goes by the ends of names.
    modules = [n for n, _ in host.named_modules(remove_duplicate=False)]
    for name in modules:
        end = next((o for o in owners if o and name.endswith(o)), None)
        if end is not None:
            owners.setdefault(name, f'{name} (by the end of its name, {end})')
    adapted = {
        target: name
        for name in owners
        for target in updates
        if name == '' or re.match(rf'(^|.*\.){name}($|\..*)', target)
    }
    if adapted:
        target, name = next(iter(adapted.items()))
        raise PeftError(
            f'{owners[name]} was trained, and PEFT saves whole modules: '
            f'{name or "the model"} has {target} in it, which is adapted; '
            'leave it frozen (trainable), or merge instead'
        )
    for name in owners:
        module = host.get_submodule(name)
        if type(module).forward is nn.Module.forward:
            raise PeftError(
                f'{owners[name]} was trained, and PEFT cannot save '
                f'{name}, a {type(module).__name__}; leave it frozen '
                '(trainable), or merge instead'
            )
    return sorted(owners), left_out


def _config_of(
    updates: dict[str, Update],
    host: nn.Module,
    saved: list[str],
    biased: bool,
    base_name: Optional[str],
) -> dict[str, Any]:
    """Write ``adapter_config.json``."""
    ranks = {name: len(update.A) for name, update in updates.items()}
    alphas = {
        name: _plain(update.scale * ranks[name])
        for name, update in updates.items()
    }
    rank, alpha = (
        Counter(values.values()).most_common(1)[0][0]
        for values in (ranks, alphas)
    )
    names = [n for n, _ in host.named_modules(remove_duplicate=False)]
    ends = tuple(f'.{name}' for name in updates)
    targets: Union[str, list] = sorted(updates)
    if any(n not in updates and n.endswith(ends) for n in names):
        # PEFT would take all names with these ends.
        targets = '|'.join(map(re.escape, targets))
    config = dict(
        peft_type='LORA',
        task_type=None,
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        rank_pattern=_others(ranks, rank),
        alpha_pattern=_others(alphas, alpha),
        modules_to_save=saved or None,
        bias='none',
        fan_in_fan_out=False,
        init_lora_weights=True,
        use_rslora=False,
        use_dora=False,
    )
    # Versions before 0.14 do not know it.
    return dict(config, lora_bias=True) if biased else config


def _plain(value: float) -> Union[int, float]:
    """Write a float32 as people do: 2.8 and not 2.799999952."""
    value = float(f'{value:.7g}')
    return int(value) if value == int(value) else value


def _others(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    return {
        f'^{re.escape(name)}': value
        for name, value in values.items()
        if value != usual
    }


def _rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.detach().to('cpu', dtype)
    if not value.isfinite().all():
        raise PeftError(
            f'{key} has values that are not finite in '
            f'{str(dtype).removeprefix("torch.")}'
        )
    return value


def _layers(state: dict[str, Tensor]) -> set[str]:
    matches = map(_LORA_KEY.fullmatch, state)
    return {match[1].removeprefix(_PREFIX) for match in matches if match}


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what is no plain LoRA, by the name of the field."""
    kind = config.get('peft_type')
    if kind != 'LORA':
        raise PeftError(
            f'peft_type is {kind!r}; only LORA can be merged into layers here'
        )
    odd = [
        f'{name}={value!r}'
        for name, value in config.items()
        if name not in _KNOWN and value
    ]
    if odd:
        raise PeftError(
            f'{odd[0]} is no plain LoRA, and what it changes is not known '
            'here; merge it by PEFT (merge_and_unload)'
        )
    start = config.get('init_lora_weights')
    if start not in _STARTS:
        raise PeftError(
            f'init_lora_weights={start!r} changed the weights of the base; '
            'save the adapters by PEFT with '
            'path_initial_model_for_weight_conversion, or merge them there'
        )
    number = (int, float)
    kinds = dict(
        r=int,
        lora_alpha=number,
        lora_dropout=number,
        rank_pattern=dict,
        alpha_pattern=dict,
        target_modules=(str, list),
        exclude_modules=(str, list),
        modules_to_save=list,
    )
    for name, kind in kinds.items():
        value = config.get(name)
        if value is None and name not in ('r', 'lora_alpha', 'target_modules'):
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise PeftError(f'{name}={value!r} has the wrong type')
        if isinstance(value, number):
            continue
        for pattern in [value] if isinstance(value, str) else value:
            try:
                check_pattern(name, pattern)
            except ValueError as error:
                raise PeftError(str(error)) from None


def _check_names(
    host: nn.Module, config: dict[str, Any], names: list[str]
) -> None:
    """Check that a host has the layers of a folder, and no others of it."""
    modules = [name for name, _ in host.named_modules()]
    lacking = [name for name in names if name not in modules]
    if lacking:
        around = next(
            (
                name.removesuffix(f'.{lacking[0]}')
                for name in modules
                if name.endswith(f'.{lacking[0]}')
            ),
            None,
        )
        hint = f'; its part {around} has' if around else ''
        raise PeftError(
            f'these adapters belong to another base: the model lacks '
            f'{len(lacking)} of their {len(names)} layers '
            f'({few(lacking)}){hint}'
        )
    if config.get('layers_to_transform') is not None:
        return
    targets = {name for name in modules if _is_target(config, name)}
    missed = [name for name in names if name not in targets]
    if missed:
        raise PeftError(
            f'{CONFIG} does not name {len(missed)} of the adapted layers in '
            f'target_modules: {few(missed)}'
        )
    more = sorted(
        name
        for name in targets.difference(names)
        if isinstance(host.get_submodule(name), (nn.Linear, nn.Conv2d))
    )
    if more:
        raise PeftError(
            f'{CONFIG} names {len(more)} layers of this model that have no '
            f'weights in {WEIGHTS} ({few(more)}): the file is damaged, or '
            'its base is another'
        )


def _is_target(config: dict[str, Any], name: str) -> bool:
    """Return whether PEFT adapts the module of a name."""
    if _is_named(config.get('exclude_modules') or [], name):
        return False
    for saved in config.get('modules_to_save') or []:
        if re.match(rf'(^|.*\.){saved}($|\..*)', name):
            return False
    return _is_named(config['target_modules'], name)


def _is_named(names: Union[str, list], name: str) -> bool:
    """Return whether a name is meant: by an expression, or by its end."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or name.endswith(tuple(f'.{end}' for end in names))


def _lora_from(
    host: nn.Module, name: str, part: dict[str, Tensor], config: dict
) -> LoRA:
    """Make the adapter of a layer from its weights and the config."""
    layer = host.get_submodule(name)
    check_called(host, name)
    rank = _by_pattern(config, 'rank_pattern', 'r', name)
    alpha = _by_pattern(config, 'alpha_pattern', 'lora_alpha', name)
    scale = alpha / (rank**0.5 if config.get('use_rslora') else rank)
    adapter = LoRA.for_layer(
        layer,
        rank=rank,
        alpha=scale * rank,
        dropout=config.get('lora_dropout') or 0.0,
        bias=bool(config.get('lora_bias')),
    )
    _check_layer(layer)
    state = dict(adapter.state_dict())
    names = {'A.weight': 'A', 'B.weight': 'B', 'B.bias': 'bias'}
    given = {names.get(key, key): value for key, value in part.items()}
    if 'B' in given and given['B'].dim() == 4:
        given['B'] = given['B'].flatten(1)
    for key in sorted(given.keys() | state.keys() - {'scale'}):
        own = state.get(key)
        shape = None if own is None else tuple(own.shape)
        other = tuple(given[key].shape) if key in given else None
        if shape != other:
            raise PeftError(
                f'{key} of its LoRA has the shape {other}, and the layer '
                f'needs {shape}, r={rank}; is this its base?'
            )
    adapter.load_state_dict({**state, **given})
    return adapter


def _by_pattern(config: dict, patterns: str, usual: str, name: str) -> Any:
    for pattern, value in (config.get(patterns) or {}).items():
        if fits_pattern(pattern, name):
            return value
    return config[usual]
