"""Put adapters into a model and freeze the rest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.structure import build_module
from lors_plugin.utils import few, part_of, text_table

from .adapter import RepAdapter
from .dry_run import parameters_without_gradient
from .presets import as_patterns, match, patterns_of
from .sites import SiteError, site_at

CHILD = 'rep_adapter'


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
        return (
            f'{text_table(rows, "<>")}\n{len(self.adapted)} layers adapted, '
            f'{self.adapted[0]} to {self.adapted[-1]}; {share:.2f} % of the '
            'weights are trained'
        )


def adapters_of(model: nn.Module) -> dict[str, RepAdapter]:
    """Return the adapters of a model by the names of their layers."""
    return {
        name.removesuffix(f'.{CHILD}'): module
        for name, module in model.named_modules()
        if isinstance(module, RepAdapter)
    }


def inject_adapters(
    model: nn.Module,
    module: str = 'backbone',
    targets: Optional[Sequence[str]] = None,
    placement: str = 'block',
    exclude: Sequence[str] = (),
    trainable: Sequence[str] = (),
    hidden_dims: int = 8,
    groups: int = 2,
    scale: float = 1.0,
    dropout: float = 0.1,
) -> AdapterReport:
    """Adapt the layers of a backbone and freeze its other weights.

    RepAdapter, section 3.3. Keys of the weights that were there do not
    change, so pretrained checkpoints load as before. A model is either
    changed or, after an error, as it was.

    Args:
        model (nn.Module): A detector, a classifier, or a backbone.
        module (str): Name of the part to adapt and freeze; '' for the whole
            model. Defaults to 'backbone'.
        targets (Sequence[str], optional): Patterns (full match) of the layers
            to adapt, inside ``module``. By default the preset of its class.
        placement (str): Of the preset: 'block' (attention and FFN), 'attn'
            or 'ffn'. Defaults to 'block'.
        exclude (Sequence[str]): Patterns of layers to leave out, or of
            modules around them.
        trainable (Sequence[str]): Patterns of the modules and parameters
            inside ``module`` that are trained with the adapters.
        hidden_dims, groups, scale, dropout: See :class:`RepAdapter`.

    Returns:
        AdapterReport: Layers and counts.

    Raises:
        SiteError: If a layer cannot be adapted exactly, or its adapter would
            never run; a ``ValueError``.
        ValueError: If nothing fits or the model has adapters already.
    """
    host = part_of(model, module)
    if adapters_of(host):
        raise ValueError(
            f'{module or "the model"} has adapters already; merge them '
            '(lors_plugin.reparam.reparameterize) before adding others'
        )
    patterns = as_patterns('targets', targets or ())
    names = match(host, patterns or patterns_of(host, placement))
    names = _without(host, names, as_patterns('exclude', exclude))
    kept = _parameters(host, as_patterns('trainable', trainable))
    adapters = {}
    for name in names:
        try:
            site = site_at(host, name)
        except SiteError as error:
            raise SiteError(f'{_join(module, name)}: {error}') from None
        adapters[name] = RepAdapter(
            site.channels,
            hidden_dims,
            groups,
            scale,
            dropout,
            site.channel_dim,
        )

    trained = {p for p in host.parameters() if p.requires_grad}
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
    return report_of(model)


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
    biases = {
        f'{name}.{CHILD}.up_bias': _join(part, name)
        for name, adapter in adapters_of(part_of(host, part)).items()
        if adapter.up_bias.requires_grad
    }
    idle = parameters_without_gradient(part_of(host, part), list(biases))
    return [biases[name] for name in idle or ()]


def attach(model: nn.Module, adapters: dict[str, RepAdapter]) -> None:
    """Give layers their adapters.

    Args:
        model (nn.Module): Any part of a model.
        adapters (dict[str, RepAdapter]): By the name of the layer.
    """
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        weight = next(layer.parameters())
        adapter.to(weight.device, weight.dtype).train(layer.training)
        layer.add_module(CHILD, adapter)
        layer.register_forward_pre_hook(adapt_input, with_kwargs=True)


def detach(model: nn.Module, names: Sequence[str]) -> None:
    """Take the adapters off layers.

    Args:
        model (nn.Module): Any part of a model.
        names (Sequence[str]): Names of adapted layers in it.
    """
    for name in names:
        layer = model.get_submodule(name)
        remove_hook(layer)
        delattr(layer, CHILD)


def adapt_input(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """Adapt the first input of a layer (a forward pre-hook).

    A function of the module, with no state of its own, so that copies of a
    model (EMA) use their own adapters.
    """
    adapter = getattr(layer, CHILD)
    if args:
        return (adapter(args[0]), *args[1:]), kwargs
    name = next(key for key in kwargs if isinstance(kwargs[key], Tensor))
    return args, {**kwargs, name: adapter(kwargs[name])}


def remove_hook(layer: nn.Module) -> None:
    """Take :func:`adapt_input` off a layer."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is adapt_input:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _placed(host: nn.Module, name: str) -> str:
    """Find the layer whose forward gets the tokens.

    BEiT's attention with ``q_bias`` and ``v_bias`` uses the weights of its
    ``qkv`` without calling it; without them it calls it. That of Swin V2
    (``logit_scale``) never does.
    """
    layer = host.get_submodule(name)
    has_qkv = isinstance(getattr(layer, 'qkv', None), nn.Linear)
    if has_qkv and not _reads_weights(layer):
        return f'{name}.qkv'
    parent_name, _, own = name.rpartition('.')
    if own == 'qkv' and _reads_weights(host.get_submodule(parent_name)):
        return parent_name
    return name


def _without(
    host: nn.Module, names: Sequence[str], exclude: Sequence[str]
) -> list:
    """Return the layers to adapt without those excluded by any name."""
    known = {}  # all names by which a layer can be meant
    for name in names:
        layer = _placed(host, name)
        if layer not in known:
            parts = layer.split('.')
            known[layer] = {
                '.'.join(parts[: i + 1]) for i in range(len(parts))
            }
            if hasattr(host.get_submodule(layer), 'qkv'):
                known[layer].add(f'{layer}.qkv')
        known[layer].add(name)
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
        parts = name.split('.')
        part = 'adapters' if CHILD in parts else parts[0]
        side = trained if param.requires_grad else frozen
        side[part] = side.get(part, 0) + param.numel()
    return AdapterReport(list(adapters_of(model)), trained, frozen)


def _join(prefix: str, name: str) -> str:
    return f'{prefix}.{name}' if prefix else name
