"""State dicts of the released ParameterNet to this package's classifier.

The released program flattens the kernels of the experts, (M, C_out C_in k k),
and keeps its hidden layer behind the pooling as a 1x1 convolution. Rows are
of any number and width: which parts a block has is read from its keys.
GhostNet as released, and as TIMM has it, is the same without experts.
"""

import math
from collections.abc import Iterable

from torch import Tensor

from .key_map import Rule, find_rule

StateDict = dict[str, Tensor]
NORM = ('weight', 'bias', 'running_mean', 'running_var')
PARTS = ('weight', 'bias')
BLOCK_OLD, BLOCK_NEW = 'blocks.{s}.{i}.', 'backbone.stages.{s}.{i}.'


def _rules(dynamic: bool) -> list[Rule]:
    """Make the rules of a network with experts or without."""

    def convs(old: str, norm: str, new: str) -> list[Rule]:
        conv = [Rule(f'{old}.weight', f'{new}.conv.weight')]
        if dynamic:
            conv = [
                Rule(f'{old}.routing.{{p}}', f'{new}.conv.routing.fc.{{p}}'),
                Rule(
                    f'{old}.cond_conv.weight',
                    f'{new}.conv.weight',
                    stacked=True,
                ),
            ]
        return [*conv, Rule(norm + '.{p}', new + '.norm.{p}')]

    ghosts = (
        ('ghost1.primary_conv', 'expand.primary'),
        ('ghost1.cheap_operation', 'expand.cheap'),
        ('ghost2.primary_conv', 'project.primary'),
        ('ghost2.cheap_operation', 'project.cheap'),
    )
    rules = convs('conv_stem', 'bn1', 'backbone.stem')
    rules += convs(
        BLOCK_OLD + 'conv', BLOCK_OLD + 'bn1', BLOCK_NEW.rstrip('.')
    )
    for old, new in ghosts:
        old = BLOCK_OLD + old
        rules += convs(f'{old}.0', f'{old}.1', BLOCK_NEW + new)
    for i in range(2):
        old = f'{BLOCK_OLD}shortcut.'
        rules += convs(
            f'{old}{2 * i}', f'{old}{2 * i + 1}', f'{BLOCK_NEW}shortcut.{i}'
        )
    return rules + [
        Rule(
            BLOCK_OLD + 'conv_dw.weight', BLOCK_NEW + 'depthwise.conv.weight'
        ),
        Rule(BLOCK_OLD + 'bn_dw.{p}', BLOCK_NEW + 'depthwise.norm.{p}'),
        Rule(BLOCK_OLD + 'se.conv_reduce.{p}', BLOCK_NEW + 'se.reduce.{p}'),
        Rule(BLOCK_OLD + 'se.conv_expand.{p}', BLOCK_NEW + 'se.expand.{p}'),
        Rule('conv_head.{p}', 'head.layers.0.fc.{p}'),
        Rule('classifier.{p}', 'head.layers.1.fc.{p}'),
    ]


DYNAMIC_RULES, PLAIN_RULES = _rules(True), _rules(False)


def rules_of(keys: Iterable[str]) -> list[Rule]:
    """Return the rules for the keys, original or ours, of a network."""
    dynamic = any('.cond_conv.' in k or '.routing.' in k for k in keys)
    return DYNAMIC_RULES if dynamic else PLAIN_RULES


def is_parameternet(keys: Iterable[str]) -> bool:
    """Return whether keys are of ParameterNet or GhostNet, any form."""
    marks = (
        'conv_stem.cond_conv.',
        'backbone.stem.conv.routing.',
        'blocks.0.0.ghost1.',
        'backbone.stages.0.0.expand.',
    )
    return any(key.startswith(marks) for key in keys)


def to_classifier(state: StateDict) -> StateDict:
    """Translate a released state dict that was checked.

    Args:
        state (dict[str, Tensor]): Original keys.

    Returns:
        dict[str, Tensor]: Keys of ``mmpretrain.ImageClassifier``.
    """
    converted, rules = {}, rules_of(state)
    for key, value in state.items():
        rule, new = find_rule(rules, key)
        if rule.stacked:
            value = value.view(_kernel_shape(state, key, new))
        elif key == 'conv_head.weight':
            value = value.flatten(1)
        converted[new] = value
    return converted


def to_released(state: StateDict) -> StateDict:
    """Translate a state dict that was checked back.

    Args:
        state (dict[str, Tensor]): Keys of ``mmpretrain.ImageClassifier``.

    Returns:
        dict[str, Tensor]: Original keys.
    """
    converted, rules = {}, rules_of(state)
    for key, value in state.items():
        rule, old = find_rule(rules, key, reverse=True)
        if rule.stacked:
            value = value.flatten(1)
        elif old == 'conv_head.weight':
            value = value[..., None, None]
        converted[old] = value
    return converted


def missing_keys(state: StateDict, reverse: bool) -> list[str]:
    """Keys that a model with the parts of this one has besides.

    Args:
        state (dict[str, Tensor]): Original keys, or of this package.
        reverse (bool): Whether they are of this package.

    Returns:
        list[str]: In the same kind of keys.
    """
    rules = rules_of(state)
    old = [find_rule(rules, key, reverse) for key in state]
    old = {match[1] for match in old if match} if reverse else set(state)
    blocks: dict[int, dict[int, set]] = {}
    for key in old:
        if key.startswith('blocks.'):
            _, stage, block, part, *_ = key.split('.')
            stage = blocks.setdefault(int(stage), {})
            stage.setdefault(int(block), set()).add(part)
    dynamic = rules is DYNAMIC_RULES
    wanted = [
        *_conv_keys('conv_stem', 'bn1', dynamic),
        *(f'{fc}.{p}' for fc in ('conv_head', 'classifier') for p in PARTS),
    ]
    last = max(blocks, default=0)
    for i in range(last):
        stage = blocks.get(i, {})
        for j in range(1 + max(stage, default=0)):
            parts = stage.get(j, set())
            wanted += _block_keys(f'blocks.{i}.{j}', parts, dynamic)
    wanted += _conv_keys(
        f'blocks.{last}.0.conv', f'blocks.{last}.0.bn1', dynamic
    )
    missing = [key for key in wanted if key not in old]
    if reverse:
        missing = [find_rule(rules, key)[1] for key in missing]
    return missing


def _conv_keys(conv: str, norm: str, dynamic: bool) -> list[str]:
    """Of a convolution and its norm, originally."""
    own = ['weight']
    if dynamic:
        own = ['routing.weight', 'routing.bias', 'cond_conv.weight']
    return [
        *(f'{conv}.{part}' for part in own),
        *(f'{norm}.{part}' for part in NORM),
    ]


def _block_keys(block: str, parts: set, dynamic: bool) -> list[str]:
    """Of a block with at least these parts, originally."""
    keys = []
    for ghost in ('ghost1', 'ghost2'):
        for part in ('primary_conv', 'cheap_operation'):
            where = f'{block}.{ghost}.{part}'
            keys += _conv_keys(f'{where}.0', f'{where}.1', dynamic)
    if parts & {'conv_dw', 'bn_dw'}:
        keys.append(f'{block}.conv_dw.weight')
        keys += [f'{block}.bn_dw.{part}' for part in NORM]
    if 'se' in parts:
        for conv in ('conv_reduce', 'conv_expand'):
            keys += [f'{block}.se.{conv}.{part}' for part in PARTS]
    if parts & {'shortcut', 'conv_dw', 'bn_dw'}:
        for i in (0, 2):
            where = f'{block}.shortcut'
            keys += _conv_keys(f'{where}.{i}', f'{where}.{i + 1}', dynamic)
    return keys


def _kernel_shape(state: StateDict, key: str, new: str) -> tuple[int, ...]:
    """(M, C_out, C_in / groups, k, k), from what is beside the kernels."""
    experts, numbers = state[key].shape
    width = state[key.replace('cond_conv', 'routing')].shape[1]
    norm = new.replace('.conv.', '.norm.')
    norm = find_rule(DYNAMIC_RULES, norm, reverse=True)[1]
    out = len(state[norm])
    depthwise = '.cheap.' in new or '.shortcut.0.' in new
    inner = 1 if depthwise else width
    kernel = math.isqrt(numbers // (out * inner))
    return experts, out, inner, kernel, kernel
