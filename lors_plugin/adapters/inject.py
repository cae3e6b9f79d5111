"""Put adapters into a model and freeze the rest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.structure import build_module
from lors_plugin.utils import few, part_of, text_table

from .adapter import Adapter, AdapterHook
from .dry_run import parameters_without_gradient
from .methods import (
    ADAPTERS,
    SELECTIONS,
    adapter_of,
    check_options,
    entries_of,
    is_adapter_key,
    options_per_layer,
)
from .presets import Target, as_patterns, match, targets_of
from .sites import ProjectionsSite, SiteError, check_called, site_of


@dataclass
class AdapterReport:
    """Adapted layers of a model, and counts of its parameters.

    Attributes:
        adapted (list[str]): Names of the adapted layers in the model.
        trained (dict[str, int]): Parameters that are trained, by their part
            of the model.
        frozen (dict[str, int]): Parameters that are not, by their part.
    """

    adapted: list
    trained: dict
    frozen: dict

    def table(self) -> str:
        """Format the counts as text, one line per part."""
        rows = [('part', 'trained', 'frozen')]
        for part in dict.fromkeys([*self.trained, *self.frozen]):
            rows.append(
                (
                    part,
                    f'{self.trained.get(part, 0):,}',
                    f'{self.frozen.get(part, 0):,}',
                )
            )
        trained, frozen = sum(self.trained.values()), sum(self.frozen.values())
        rows.append(('all', f'{trained:,}', f'{frozen:,}'))
        share = 100 * trained / max(trained + frozen, 1)
        where = 'no layer adapted'
        if self.adapted:
            where = (
                f'{len(self.adapted)} layers adapted, {self.adapted[0]} to '
                f'{self.adapted[-1]}'
            )
        return (
            f'{text_table(rows, "<>")}\n{where}; {share:.2f} % of the weights '
            'are trained'
        )


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by the names of their layers."""
    return {
        name.rpartition('.')[0]: module
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }


def inject_adapters(
    model: nn.Module,
    module: str = 'backbone',
    targets: Union[None, Target, Sequence[Target]] = None,
    placement: str = 'block',
    exclude: Sequence[str] = (),
    trainable: Sequence[str] = (),
    method: str = 'rep_adapter',
    peft: Optional[str] = None,
    **options: Any,
) -> AdapterReport:
    """Adapt the layers of a backbone and freeze its other weights.

    Keys of the weights that were there do not change, so pretrained
    checkpoints load as before. A model is either changed or, after an error,
    as it was.

    Args:
        model (nn.Module): A detector, a classifier, or a backbone.
        module (str): Name of the part to adapt and freeze; '' for the whole
            model. Defaults to 'backbone'.
        targets (Sequence, optional): Patterns (full match) of the layers
            to adapt, inside ``module``. By default the preset of its class.
            Of an attention a pair adapts some inputs only:
            ``(pattern, 'q')`` the query, ``(pattern, 'kv')`` key and value.
        placement (str): Of the preset: 'block' (attention and FFN), 'attn'
            or 'ffn'. Defaults to 'block'.
        exclude (Sequence[str]): Patterns of layers to leave out, or of
            modules around them.
        trainable (Sequence[str]): Patterns of the modules and parameters
            inside ``module`` that are trained with the adapters.
        method (str): 'rep_adapter' (RepAdapter, section 3.3) or 'lora'; or
            without adapters: 'bitfit' trains the biases inside ``module``,
            'norm' its normalisations, 'linear_probe' nothing of it.
        peft (str, optional): A folder of PEFT whose LoRA is trained further:
            it says which layers of ``module`` are adapted, and how, and
            which other modules are trained. For ``method='lora'``.
        **options: Of the method: ``hidden_dims``, ``groups``, ``scale``,
            ``dropout`` of :class:`RepAdapter`; ``rank``, ``alpha``,
            ``dropout``, ``bias`` of :class:`LoRA`, and as in PEFT
            ``rank_pattern`` and ``alpha_pattern``: values for some layers,
            by patterns of the ends of their names.

    Returns:
        AdapterReport: Layers and counts.

    Raises:
        SiteError: If a layer cannot be adapted exactly, or its adapter would
            never run; a ``ValueError``.
        ValueError: If nothing fits or the model has adapters already.
    """
    host = part_of(model, module)
    check_options(method, options)
    if adapters_of(host):
        raise ValueError(
            f'{module or "the model"} has adapters already; merge them '
            '(lors_plugin.reparam.reparameterize) before adding others'
        )
    kept = _parameters(host, as_patterns('trainable', trainable))
    adapters, entries = {}, {}
    if peft is not None:
        from .peft import lora_of  # which needs this module

        given = dict(targets=targets, exclude=exclude, **options)
        odd = [name for name, value in given.items() if value]
        if method != 'lora' or odd or placement != 'block':
            raise ValueError(
                f"peft={str(peft)!r} holds a LoRA: give method='lora', and "
                f'leave out {odd[0] if odd else "placement"}, which the '
                'folder says'
            )
        adapters, entries = lora_of(host, peft)
        kept |= entries.keys()
    elif method in SELECTIONS:
        given = dict(targets=targets, exclude=exclude)
        odd = [name for name, value in given.items() if value]
        if odd or placement != 'block':
            raise ValueError(
                f'method={method!r} adapts no layers; leave out '
                f'{odd[0] if odd else "placement"}, or name more parameters '
                'in trainable'
            )
        kept |= SELECTIONS[method](host)
    else:
        found = (
            targets_of(host, placement)
            if targets is None
            else match(host, targets)
        )
        wanted = _each_placed(host, found, method)
        names = _without(host, wanted, as_patterns('exclude', exclude))
        chosen = options_per_layer(method, names, options)
        for name in names:
            adapters[name] = _adapter_at(
                host, module, name, method, {**chosen[name], **wanted[name][1]}
            )

    trained = {p for p in host.parameters() if p.requires_grad}
    if not adapters and host is model and not kept:
        raise ValueError(
            f'method={method!r} leaves nothing of the model to be trained; '
            'give the module that is frozen, or trainable'
        )
    for key, param in host.named_parameters():
        param.requires_grad_(key in kept and param.requires_grad)
    attach(host, adapters)
    idle = idle_adapters(host)
    if idle:
        detach(host, list(adapters))
        for param in trained:
            param.requires_grad_(True)
        raise SiteError(
            f'no output of {module or "the model"} depends on {len(idle)} of '
            f'the adapted layers: {few([_join(module, n) for n in idle])}. '
            'Their weights are read without a call, or they lie behind the '
            'outputs that are used (out_indices?); exclude them or give '
            'other targets'
        )
    fill(host, entries)
    return report_of(model)


@torch.no_grad()
def fill(host: nn.Module, entries: dict[str, Tensor]) -> None:
    """Write entries of a state dict into a model that has them."""
    there = entries_of(host)
    for key, value in entries.items():
        there[key].copy_(value)


def _adapter_at(
    host: nn.Module, module: str, name: str, method: str, options: dict
) -> Adapter:
    """Make the adapter of a layer; errors name the layer."""
    try:
        check_called(host, name)
        return ADAPTERS[method].for_layer(host.get_submodule(name), **options)
    except SiteError as error:
        raise SiteError(f'{_join(module, name)}: {error}') from None


@MODELS.register_module(name='AdaptedModel')
def build_adapted_model(
    module: dict,
    part: str = '',
    data_preprocessor: Optional[dict] = None,
    **options: Any,
) -> nn.Module:
    """Build a module with adapters in it.

    The result is the module itself, not a wrapper: its class is the one that
    its host expects, and keys have no further prefix. Unlike a hook, the
    entry holds wherever a model is built. Train it with a
    ``RepAdapterHook`` beside it, which then keeps frozen statistics and
    watches gradients.

    Args:
        module (dict): Config of any module, such as a backbone.
        part (str): Name of the part of it to adapt and freeze. Defaults to
            the module itself.
        data_preprocessor (dict, optional): Of a whole model; the runner
            gives it.
        **options: Of :func:`inject_adapters`.

    Returns:
        nn.Module: The module that ``module`` describes, changed.

    Examples:
        >>> backbone = dict(
        ...     type='lors_plugin.AdaptedModel',
        ...     module=dict(type='VisionTransformer', arch='deit-tiny'),
        ...     scale=0.5,
        ... )
    """
    built = build_module(module, data_preprocessor)
    report = inject_adapters(built, module=part, **options)
    print_log(f'RepAdapter\n{report.table()}', logger='current')
    return built


def idle_adapters(host: nn.Module) -> list[str]:
    """Find adapters on which no output depends.

    Args:
        host (nn.Module): Adapted. A backbone for images is run without
            values; of a whole model of MMEngine its backbone, since
            ``mode='tensor'`` leaves out what only a loss runs.

    Returns:
        list[str]: Names of their layers; none if the host cannot run so.
    """
    part = ''
    if isinstance(host, BaseModel):
        part = 'backbone'
        if not isinstance(getattr(host, part, None), nn.Module):
            return []
    params = dict(part_of(host, part).named_parameters())
    names = {id(param): name for name, param in params.items()}
    watched = {
        names[id(adapter.first_trained)]: _join(part, layer)
        for layer, adapter in adapters_of(part_of(host, part)).items()
        if adapter.first_trained.requires_grad
    }
    idle = parameters_without_gradient(part_of(host, part), list(watched))
    return [watched[name] for name in idle or ()]


def attach(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Give layers their adapters.

    Args:
        model (nn.Module): Any part of a model.
        adapters (dict[str, Adapter]): By the name of the layer.
    """
    for name, adapter in adapters.items():
        attach_to(model.get_submodule(name), adapter)


def attach_to(layer: nn.Module, adapter: Adapter) -> None:
    """Give a layer its adapter, on its device and in its dtype."""
    weight = next(layer.parameters())
    adapter.to(weight.device, weight.dtype).train(layer.training)
    layer.add_module(adapter.child, adapter)
    adapter.register(layer)


def detach(model: nn.Module, names: Sequence[str]) -> None:
    """Take the adapters off layers.

    Args:
        model (nn.Module): Any part of a model.
        names (Sequence[str]): Names of adapted layers in it.
    """
    for name in names:
        detach_from(model.get_submodule(name))


def detach_from(layer: nn.Module) -> Adapter:
    """Take the adapter off a layer, with its hooks on modules inside.

    Returns:
        Adapter: The adapter, with its weights.
    """
    adapter = adapter_of(layer)
    for module in layer.modules():
        for hooks, flags in (
            (
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
            ),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(hook, AdapterHook) and hook.adapter is adapter:
                    del hooks[key]
                    flags.pop(key, None)
    delattr(layer, adapter.child)
    return adapter


def _placed(host: nn.Module, name: str) -> str:
    """Find the layer whose forward gets the tokens.

    BEiT's attention with ``q_bias`` and ``v_bias`` uses the weights of its
    ``qkv`` without calling it; without them it calls it. That of Swin V2
    (``logit_scale``) never does. MMCV's attention has that of PyTorch inside.
    """
    layer = host.get_submodule(name)
    has_qkv = isinstance(getattr(layer, 'qkv', None), nn.Linear)
    if has_qkv and not _reads_weights(layer):
        return f'{name}.qkv'
    if isinstance(layer._modules.get('attn'), nn.MultiheadAttention):
        return f'{name}.attn'
    parent_name, _, own = name.rpartition('.')
    if own == 'qkv' and _reads_weights(host.get_submodule(parent_name)):
        return parent_name
    return name


def _each_placed(
    host: nn.Module, wanted: dict[str, str], method: str
) -> dict[str, tuple[set, dict]]:
    """Find the layer of each target.

    Args:
        host (nn.Module): What is adapted.
        wanted (dict[str, str]): Names of modules, and inputs of each.
        method (str): A LoRA adapts each projection of an attention by itself.

    Returns:
        dict[str, tuple]: By the name of the layer: the names by which it was
        meant, and options of its adapter.
    """
    placed: dict[str, tuple[set, dict]] = {}
    for name, inputs in wanted.items():
        layers = [_placed(host, name)]
        options = dict(inputs=inputs) if inputs else {}
        layer = host.get_submodule(layers[0])
        if method == 'lora' and ProjectionsSite.fits(layer):
            site, options = site_of(layer, inputs), {}
            layers = [
                f'{layers[0]}.{site.names[x]}'.removeprefix('.')
                for x in site.inputs
            ]
        for layer in layers:
            placed.setdefault(layer, (set(), options))[0].add(name)
    return placed


def _without(
    host: nn.Module,
    wanted: dict[str, tuple[set, dict]],
    exclude: Sequence[str],
) -> list:
    """Return the layers to adapt without those excluded by any name."""
    known = {}  # all names by which a layer can be meant
    for layer, (names, _) in wanted.items():
        parts = layer.split('.')
        known[layer] = names | {
            '.'.join(parts[: i + 1]) for i in range(len(parts))
        }
        if hasattr(host.get_submodule(layer), 'qkv'):
            known[layer].add(f'{layer}.qkv')
    left = dict(known)
    for pattern in exclude:
        hits = [k for k, v in known.items() if _full_matches(pattern, v)]
        if not hits:
            raise ValueError(
                f'exclude pattern {pattern!r} leaves out none of the layers '
                f'to adapt, which are like {list(known)[-2:]} (full match)'
            )
        for layer in hits:
            left.pop(layer, None)
    if not left:
        raise ValueError(f'exclude={list(exclude)} leaves nothing to adapt')
    return list(left)


def _reads_weights(attention: nn.Module) -> bool:
    split = getattr(attention, 'q_bias', None) is not None
    return split or hasattr(attention, 'logit_scale')


def _parameters(host: nn.Module, patterns: Sequence[str]) -> set:
    """Return the parameters that patterns of modules or names choose."""
    if not patterns:
        return set()
    modules = {name for name, _ in host.named_modules()}
    keys = [key for key, _ in host.named_parameters()]
    kept = set()
    for pattern in patterns:
        chosen = _full_matches(pattern, [*modules, *keys])
        hits = {
            key
            for key in keys
            if key in chosen or any(key.startswith(f'{m}.') for m in chosen)
        }
        if not hits:
            raise ValueError(
                f'trainable pattern {pattern!r} matches no parameter; names '
                f'are like {keys[-2:]} (full match)'
            )
        kept |= hits
    return kept


def _full_matches(pattern: str, names: Sequence[str]) -> set:
    return {name for name in names if name and re.fullmatch(pattern, name)}


def report_of(model: nn.Module) -> AdapterReport:
    """Report the adapted layers of a model, and what of it is trained."""
    trained, frozen = {}, {}
    for name, param in model.named_parameters():
        part = 'adapters' if is_adapter_key(name) else name.split('.')[0]
        side = trained if param.requires_grad else frozen
        side[part] = side.get(part, 0) + param.numel()
    return AdapterReport(list(adapters_of(model)), trained, frozen)


def _join(prefix: str, name: str) -> str:
    return f'{prefix}.{name}' if prefix else name
