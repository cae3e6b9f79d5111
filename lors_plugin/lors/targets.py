"""Find the layers of a model that belong to one stack, by their names."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Union

from torch import nn

from lors_plugin.utils import has_own_forward, per_layer

from .linear import LowRankResidualLinear

OPTIONS = ('pattern', 'ranks', 'groups')


class Stack(NamedTuple):
    """Layers that will share a weight.

    Attributes:
        names (list[str]): Of the layers in the model, in their order.
        layers (list[nn.Linear]): The layers.
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
        **defaults: ``ranks`` and ``groups`` of targets without their own.

    Returns:
        list[Stack]: In the order of the targets.

    Raises:
        ValueError: If a pattern finds nothing or layers cannot share.
    """
    if isinstance(targets, (str, dict)) or not targets:
        raise ValueError(
            f'targets={targets!r} must be a list of patterns, such as '
            r"['layers\.(\d+)\.attn\.qkv']"
        )
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LowRankResidualLinear))
    }
    stacks, taken = [], {}
    for target in targets:
        options = {**defaults, **_as_dict(target)}
        pattern = options.pop('pattern')
        for names in _matches(pattern, linears):
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
    unknown = set(target) - set(OPTIONS)
    if unknown or 'pattern' not in target:
        raise ValueError(
            f'target {dict(target)} must have a pattern and may have ranks '
            'and groups, nothing else'
        )
    return dict(target)


def _matches(pattern: str, linears: dict) -> list[list[str]]:
    """Names of the layers of each stack, in the order of their numbers."""
    compiled = re.compile(pattern)
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
            stacks.setdefault(tuple(others), []).append((int(number), name))
    if not stacks:
        near = [name for name in linears if compiled.search(name)]
        hint = (
            f'it is found inside {near[:3]}, but must match the whole name'
            if near
            else f'linear layers are named like {list(linears)[-3:]}'
        )
        raise ValueError(f'target {pattern!r} matches no linear layer: {hint}')
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
            'with; is the number of the layer the last group?'
        )
    for name, layer in zip(names, layers):
        if isinstance(layer, LowRankResidualLinear):
            raise ValueError(f'{where}: {name} shares its weight already')
        if not _is_plain(layer):
            raise ValueError(
                f'{where}: {name} is a {type(layer).__name__} with hooks, '
                'parts or a forward of its own, not a plain linear layer; '
                'share before adding adapters and the like'
            )
        kinds = [
            (tuple(w.shape), w.dtype, w.device)
            for w in (layer.weight, layers[0].weight)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f'{where}: {name} has a weight of {_describe(kinds[0])}, '
                f'{names[0]} one of {_describe(kinds[1])}; layers that '
                'share must be alike, so give each kind its own target'
            )


def _is_plain(layer: nn.Linear) -> bool:
    """A linear layer or a host's wrapper that only adds to its name."""
    return (
        not has_own_forward(layer)
        and not layer._modules
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and set(layer._parameters) == {'weight', 'bias'}
    )


def _describe(kind: tuple) -> str:
    shape, dtype, device = kind
    return f'shape {shape}, {dtype} on {device}'


def _ranks(
    where: str,
    layers: Sequence[nn.Linear],
    ranks: Union[int, Sequence[int]],
    groups: Union[int, Sequence[int]],
) -> list[int]:
    """Ranks of the private parts, ``K r``."""
    number = len(layers)
    ranks = per_layer(f'{where}: ranks', ranks, number, minimum=0)
    groups = per_layer(f'{where}: groups', groups, number)
    totals = [k * r for k, r in zip(groups, ranks)]
    most = min(layers[0].weight.shape)
    if max(totals) > most:
        raise ValueError(
            f'{where}: rank {max(totals)} (groups times ranks) is above '
            f'{most}, the full rank of these layers'
        )
    return totals
