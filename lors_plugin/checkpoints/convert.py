"""State dicts of the original programs to this package, and back."""

import re

import torch
from torch import Tensor

from .backbones import backbone_problems
from .key_map import CONSTANT_KEY, CONSTANT_ROW, KEY_MAPS, find_rule
from .parameternet import (
    is_parameternet,
    missing_keys,
    rules_of,
    to_classifier,
    to_released,
)

StateDict = dict[str, Tensor]
BACKBONE = 'backbone.'


class ConversionError(ValueError):
    """A checkpoint cannot be read or converted; nothing was written."""


def guess_source(state: StateDict) -> str:
    """Guess the original program that wrote a state dict.

    Raises:
        ConversionError: If the keys are of none.
    """
    keys = ' '.join(state)
    if 'common_parameter_generator' in keys or 'mixing.channel_part' in keys:
        return 'lors'
    if (
        'sampling_n_mixing' in keys
        or 'decoder.mixing.0.generator' in keys
        or ('parameter_generator.0' in keys)
    ):
        return 'adamixer'
    # A backbone of a detector may be one too, so the decoder is asked first.
    if is_parameternet(state):
        return 'parameternet'
    raise ConversionError(
        'the keys are of no program known here; the first ones: '
        + ', '.join(list(state)[:5])
    )


def is_converted(state: StateDict, source: str) -> bool:
    """Return whether keys are those of this package, not of the program.

    Args:
        state (dict[str, Tensor]): Keys and weights.
        source (str): 'adamixer', 'lors' or 'parameternet'.

    Returns:
        bool: False too where keys are the same in both.
    """
    rules = KEY_MAPS.get(source) or rules_of(state)
    theirs, ours = (
        sum(find_rule(rules, key, reverse) is not None for key in state)
        for reverse in (False, True)
    )
    return ours > theirs


def to_lors_plugin(
    state: StateDict, source: str, check_backbone: bool = True
) -> StateDict:
    """Translate a state dict of an original program.

    Args:
        state (dict[str, Tensor]): Original keys and weights, of a whole
            detector, of parts without the backbone, or of a classifier.
        source (str): 'adamixer', 'lors' or 'parameternet'.
        check_backbone (bool): Compare the backbone's keys with those of the
            published ones. Backbones of other kinds are taken over as they
            are. Defaults to True.

    Returns:
        dict[str, Tensor]: Keys of this package.

    Raises:
        ConversionError: If keys are unknown or missing; lists all of them.
    """
    if source == 'parameternet':
        return to_classifier(_checked_classifier(state, reverse=False))
    state = {k: v for k, v in state.items() if k != CONSTANT_KEY}
    rules = KEY_MAPS[source]
    _check_complete(state, rules, False, check_backbone)
    groups = _num_groups(state) if source == 'lors' else 1
    converted = {}
    for key, value in state.items():
        rule, new = find_rule(rules, key)
        if rule.stacked:
            if groups < 1 or len(value) % groups:
                raise ConversionError(
                    f'{key} of shape {tuple(value.shape)} does not split '
                    f'into the {groups} groups of the shared generator'
                )
            value = value.unflatten(0, (groups, -1))
        converted[new] = value
    return converted


def to_original(
    state: StateDict, target: str, check_backbone: bool = True
) -> StateDict:
    """Translate a state dict of this package back.

    Args:
        state (dict[str, Tensor]): Keys of this package.
        target (str): 'adamixer', 'lors' or 'parameternet'.
        check_backbone (bool): As in :func:`to_lors_plugin`.

    Returns:
        dict[str, Tensor]: Original keys, the constant positions included.

    Raises:
        ConversionError: As in :func:`to_lors_plugin`.
    """
    if target == 'parameternet':
        return to_released(_checked_classifier(state, reverse=True))
    rules = KEY_MAPS[target]
    _check_complete(state, rules, True, check_backbone)
    converted = {}
    for key, value in state.items():
        rule, old = find_rule(rules, key, reverse=True)
        converted[old] = value.flatten(0, 1) if rule.stacked else value
    content = state.get('query_generator.content.weight')
    if content is not None:
        converted[CONSTANT_KEY] = torch.tensor(CONSTANT_ROW).repeat(
            len(content), 1
        )
    return converted


def backbone_keys(state: StateDict) -> list[str]:
    """Keys of the backbone without their prefix; the same on both sides."""
    return [
        key.removeprefix(BACKBONE) for key in state if key.startswith(BACKBONE)
    ]


def _num_groups(state: StateDict) -> int:
    """``G``, which the stacked factors of LORS hide."""

    def first(name):
        for key, value in state.items():
            if name in key:
                return value
        raise ConversionError(f'missing keys: there is no {name}')

    width = first('ml_parameters').shape[1]
    out_points = first('sl_parameters').shape[1]
    in_points = first('sr_parameters').shape[2]
    generated = len(first('common_parameter_generator.weight'))
    return generated // (width**2 + out_points * in_points)


def _check_complete(
    state: StateDict, rules: list, reverse: bool, check_backbone: bool
) -> None:
    unknown = [k for k in state if find_rule(rules, k, reverse) is None]
    missing = {
        *_missing_in_stages(state),
        *_missing_kinds(state, rules, reverse),
        *_missing_halves(state, rules, reverse),
    }
    if check_backbone:
        _, strangers, absent = backbone_problems(backbone_keys(state))
        unknown += [BACKBONE + key for key in strangers]
        missing.update(BACKBONE + key for key in absent)
    _raise_problems(unknown, sorted(missing))


def _checked_classifier(state: StateDict, reverse: bool) -> StateDict:
    """The state dict of a ParameterNet, if it is a whole one."""
    rules = rules_of(state)
    unknown = [k for k in state if find_rule(rules, k, reverse) is None]
    _raise_problems(unknown, missing_keys(state, reverse))
    return state


def _raise_problems(unknown: list, missing: list) -> None:
    problems = []
    if unknown:
        problems.append(f'{len(unknown)} unknown keys: ' + ', '.join(unknown))
    if missing:
        problems.append(f'{len(missing)} missing keys: ' + ', '.join(missing))
    if problems:
        raise ConversionError('; '.join(problems))


def _missing_in_stages(state: StateDict) -> list:
    """Keys that some stages, or levels of the neck, have and one lacks."""
    stages = {'neck': {}, 'decoder': {}}
    for key in state:
        if key.startswith(('roi_head.', 'decoder.', 'neck.')):
            match = re.search(r'\.(\d+)(?=\.|$)', key)
            if match:
                kind = key[: match.start(1)] + '{}' + key[match.end(1) :]
                part = 'neck' if key.startswith('neck.') else 'decoder'
                stages[part].setdefault(kind, set()).add(int(match[1]))
    missing = []
    for kinds in stages.values():
        number = 1 + max(map(max, kinds.values()), default=-1)
        missing += [
            kind.format(stage)
            for kind, present in kinds.items()
            for stage in set(range(number)) - present
        ]
    return missing


def _missing_kinds(state: StateDict, rules: list, reverse: bool) -> list:
    """Kinds of keys that a whole detector has and this one lacks."""
    if not backbone_keys(state):
        return []  # a part of a detector
    found = [find_rule(rules, key, reverse) for key in state]
    used = {match[0] for match in found if match}
    return [
        rule.new if reverse else rule.old
        for rule in rules
        if rule not in used and not rule.optional
    ]


def _missing_halves(state: StateDict, rules: list, reverse: bool) -> list:
    """Weights without their bias and the reverse, behind the backbone."""
    missing = []
    for key in state:
        stem, _, name = key.rpartition('.')
        other = dict(weight='bias', bias='weight').get(name)
        match = find_rule(rules, key, reverse)
        if (
            other
            and match
            and match[0].old.endswith('{p}')
            and not key.startswith(BACKBONE)
            and f'{stem}.{other}' not in state
        ):
            missing.append(f'{stem}.{other}')
    return missing
