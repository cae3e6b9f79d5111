"""Find the layers of a model that belong to one stack, by their names."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Union

from torch import nn

from lors_plugin.utils import (
    check_at_least,
    check_pattern,
    check_targets,
    has_own_forward,
    per_layer,
)

from .linear import LowRankResidualLinear
from .other_layers import LowRankMultiheadAttention

OPTIONS = ('pattern', 'ranks', 'groups', 'cycle')
IN_PROJ = '.in_proj'


class Stack(NamedTuple):
    """Layers that will share a weight.

    Attributes:
        names (list[str]): Of the layers in the model, in their order.
        layers (list[nn.Module]): Linear layers, convolutions, or PyTorch's
            attentions, of which ``in_proj_weight`` will be shared.
        ranks (list[int]): Rank of each private part, ``K r``.
    """

    names: list
    layers: list
    ranks: list


def find_stacks(
    model: nn.Module, targets: Sequence[Union[str, dict]], **defaults: Any
) -> list[Stack]:
    """Find the stacks that patterns describe; everything is checked here.

    Args:
        model (nn.Module): Any model.
        targets (Sequence[str | dict]): See :func:`share_stack`.
        **defaults: ``ranks``, ``groups`` and ``cycle`` of targets without
            their own.

    Returns:
        list[Stack]: In the order of the targets.

    Raises:
        ValueError: If a pattern finds nothing or layers cannot share.
    """
    check_targets(targets, r'layers\.(\d+)\.attn\.qkv')
    linears = {}
    kinds = nn.Linear, nn.Conv2d, LowRankResidualLinear
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            linears[name] = module
        elif (
            isinstance(module, nn.MultiheadAttention)
            and module._qkv_same_embed_dim
            and not isinstance(module, LowRankMultiheadAttention)
        ):
            linears[name + IN_PROJ] = module
    stacks, taken = [], {}
    for target in targets:
        options = {**defaults, **_as_dict(target)}
        pattern = options.pop('pattern')
        cycle = check_at_least(
            f'target {pattern!r}: cycle', options.pop('cycle', 1)
        )
        for names in _matches(pattern, linears, cycle):
            for name in names:
                if name in taken:
                    raise ValueError(
                        f'{name} is matched by {taken[name]!r} and by '
                        f'{pattern!r}'
                    )
                taken[name] = pattern
            layers = [linears[name] for name in names]
            where = f'target {pattern!r}'
            _check(where, names, layers)
            ranks = _ranks(where, layers, **options)
            stacks.append(Stack(names, layers, ranks))
    return stacks


def _as_dict(target: Union[str, dict]) -> dict:
    if isinstance(target, str):
        return dict(pattern=target)
    if (
        not isinstance(target, dict)
        or set(target) - set(OPTIONS)
        or 'pattern' not in target
    ):
        raise ValueError(
            f'target {target!r} must be a pattern, or a dict: it must have a '
            'pattern and may have ranks, groups and cycle, nothing else'
        )
    return dict(target)


def _matches(pattern: str, linears: dict, cycle: int) -> list[list[str]]:
    """Names of the layers of each stack, in the order of their numbers.

    With a ``cycle``, every so many layers are a stack.
    """
    compiled = check_pattern('targets', pattern)
    if not compiled.groups:
        raise ValueError(
            f'target {pattern!r} has no group for the number of the layer; '
            r'write it in brackets: layers\.(\d+)\.'
        )
    stacks = {}
    for name in linears:
        found = compiled.fullmatch(name)
        if found:
            *others, number = found.groups()
            if not (number or '').isdigit():
                raise ValueError(
                    f'target {pattern!r}: the last group is the number of '
                    f'the layer, but in {name} it is {number!r}'
                )
            stack = (*others, int(number) % cycle)
            stacks.setdefault(stack, []).append((int(number), name))
    if not stacks:
        near = [name for name in linears if compiled.search(name)]
        hint = (
            f'it is found inside {near[:3]}, but must match the whole name'
            if near
            else f'layers are named like {list(linears)[-3:]}'
        )
        raise ValueError(
            f'target {pattern!r} matches no linear layer or convolution: '
            f'{hint}'
        )
    for found in stacks.values():
        numbers = [number for number, _ in found]
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f'target {pattern!r} finds several layers of one number in '
                f'{[name for _, name in found][:4]}; give each kind of layer '
                'a target of its own'
            )
    return [[name for _, name in sorted(found)] for found in stacks.values()]


def _check(where: str, names: Sequence[str], layers: Sequence) -> None:
    if len(layers) == 1:
        raise ValueError(
            f'{where} finds {names[0]} alone, which has nothing to share '
            'with; is the number of the layer the last group, and the cycle '
            'at most half of the layers?'
        )
    for name, layer in zip(names, layers):
        if isinstance(layer, LowRankResidualLinear):
            raise ValueError(f'{where}: {name} shares its weight already')
        if not _is_plain(layer):
            raise ValueError(
                f'{where}: {name} is a {type(layer).__name__} with hooks, '
                'parts or a forward of its own, not a plain layer; share '
                'before adding adapters and the like'
            )
        if getattr(layer, 'padding_mode', 'zeros') != 'zeros':
            raise ValueError(
                f'{where}: {name} pads with {layer.padding_mode!r}; only '
                'convolutions that pad with zeros can share'
            )
        kinds = [
            (tuple(w.shape), w.dtype, w.device)
            for w in (weight_of(layer), weight_of(layers[0]))
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f'{where}: {name} has a weight of {_describe(kinds[0])}, '
                f'{names[0]} one of {_describe(kinds[1])}; layers that '
                'share must be alike, so give each kind its own target'
            )


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer that will be shared."""
    joint = isinstance(layer, nn.MultiheadAttention)
    return layer.in_proj_weight if joint else layer.weight


def _is_plain(layer: nn.Module) -> bool:
    """A layer or a host's wrapper that only adds to its name."""
    parts, own = set(), {'weight', 'bias'}
    if isinstance(layer, nn.MultiheadAttention):
        # A LORS layer may have its name already.
        parts, own = {'out_proj'}, {'in_proj_weight', 'in_proj_bias'}
    return (
        not has_own_forward(layer)
        and set(layer._modules) == parts
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and own <= set(layer._parameters)
        and not hasattr(layer, 'parametrizations')
    )


def _describe(kind: tuple) -> str:
    shape, dtype, device = kind
    return f'shape {shape}, {dtype} on {device}'


def _ranks(
    where: str,
    layers: Sequence[nn.Module],
    ranks: Union[int, Sequence[int]],
    groups: Union[int, Sequence[int]],
) -> list[int]:
    """Ranks of the private parts, ``K r``."""
    number = len(layers)
    ranks = per_layer(f'{where}: ranks', ranks, number, minimum=0)
    groups = per_layer(f'{where}: groups', groups, number)
    totals = [k * r for k, r in zip(groups, ranks)]
    most = min(weight_of(layers[0]).flatten(1).shape)
    if max(totals) > most:
        raise ValueError(
            f'{where}: rank {max(totals)} (groups times ranks) is above '
            f'{most}, the full rank of these layers'
        )
    return totals
