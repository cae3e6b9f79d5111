"""Presets: which layers of a model get adapters by default.

A model is known by the blocks that it is made of: their table here says, by
class, which layers inside read what an attention or an FFN gets. Classes are
told by the names of their packages and their own, so that no host has to be
imported; a derived class is known by its base. RepAdapter, section 3.3:
before the attention and before the FFN.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Union

from torch import nn

from lors_plugin.utils import check_choice, check_pattern, check_targets

from .sites import is_site

PLACEMENTS = ('block', 'attn', 'ffn')
# A pattern, or a pair: a pattern, and which inputs of an attention.
Target = Union[str, tuple[str, str]]


class Block(NamedTuple):
    """Layers that get adapters in one kind of block.

    Attributes:
        part (str): 'attn' or 'ffn', see ``placement``.
        kind (str): Pattern (full match) of '<package>.<class>', or of
            '<module>.<class>' where a package has several of that name.
        layers (str): Pattern (full match) of the names of the layers inside;
            '' is the block itself. What cannot have an adapter is left out.
        inputs (str): Which inputs of an attention, see
            :class:`~lors_plugin.adapters.sites.Site`.
    """

    part: str
    kind: str
    layers: str
    inputs: str = ''


BLOCKS = (
    # ViT, DINOv2, DeiT, CLIP, EVA-02, MViT, SAM, BEiT; ViTDet is a project
    # in the source tree of MMDetection.
    Block(
        'attn',
        r'(mmpretrain|mmseg|timm|projects)\.(Multihead|MultiScale|BEiT)?'
        r'Attention(WithRoPE)?',
        r'qkv',
    ),
    Block(
        'ffn',
        r'(mmpretrain|timm|projects)\.(Mlp|MLP|GluMlp|SwiGLU|SwiGLUFFN|'
        r'DeiT3FFN)',
        r'fc1(_[gx])?|w12',
    ),
    # Swin; zeros that fill up a window go through the adapter as they go
    # through the layer behind it. That of Swin V2 normalises its keys.
    Block('attn', r'(mmpretrain|mmdet|mmseg)\.WindowMSA', r'qkv'),
    Block('attn', r'timm\.models\.swin_transformer\.WindowAttention', r'qkv'),
    # Transformers of MMDetection and MMSegmentation.
    Block('attn', r'mmcv\.MultiheadAttention', r'attn'),
    Block('attn', r'mmcv\.MultiScaleDeformableAttention', r'value_proj'),
    Block('attn', r'mmdet\.ConditionalAttention', r''),
    Block('attn', r'mmdet\.BiMultiHeadAttention', r'(values_)?[vl]_proj'),
    Block('ffn', r'mmcv\.FFN', r'layers\.0\.0'),
    Block('ffn', r'(mmdet|mmseg)\.MixFFN', r'layers\.0'),
    # Convolutional networks, in front of pointwise layers.
    Block('ffn', r'mmpretrain\.ConvNeXtBlock', r'pointwise_conv1'),
    Block('ffn', r'(mmdet|mmpretrain|mmseg)\.Bottleneck', r'conv1'),
    Block('ffn', r'mmdet\.CSPLayer', r'(main|final)_conv\.conv'),
    Block('ffn', r'mmdet\.CSPNeXtBlock', r'conv2\.pointwise_conv\.conv'),
    # Hugging Face, and what MMDetection has of it. The keys of DINOv3 have
    # no bias, and the one that merging would give them would be rotated.
    Block('attn', r'transformers\.DINOv3ViTAttention', r'', 'qv'),
    Block('attn', r'(transformers|mmdet)\.\w*Attention', r'|qkv'),
    Block('ffn', r'transformers\.\w*Intermediate', r'dense'),
    Block(
        'ffn',
        r'transformers\.\w*(MLP|Mlp|MLPBlock|FFN)',
        r'fc1|lin1|weights_in|up_proj|gate_proj',
    ),
)


def targets_of(module: nn.Module, placement: str) -> dict[str, str]:
    """Find the layers of a model's known blocks.

    Args:
        module (nn.Module): A backbone, or any other model.
        placement (str): 'block' (attention and FFN), 'attn' or 'ffn'.

    Returns:
        dict[str, str]: See :func:`match`.

    Raises:
        ValueError: If the model has no such block.
    """
    check_choice('placement', placement, PLACEMENTS)
    found: dict[str, Block] = {}
    for name, block in module.named_modules():
        for known in _known(block):
            for inner, layer in block.named_modules():
                if re.fullmatch(known.layers, inner) and is_site(layer):
                    whole = '.'.join(filter(None, (name, inner)))
                    found.setdefault(whole, known)
    if not found:
        raise ValueError(
            f'no preset for {type(module).__name__}: presets know blocks of '
            'MMDetection, MMPretrain, MMSegmentation, timm and transformers. '
            'Give targets=[...], patterns of the layers that read the tokens'
        )
    chosen = {
        name: found[name].inputs
        for name, _ in module.named_modules()
        if name in found and placement in ('block', found[name].part)
    }
    if not chosen:
        raise ValueError(
            f'{type(module).__name__} has no place for '
            f'placement={placement!r}; use placement="block"'
        )
    return chosen


def _known(block: nn.Module) -> Iterator[Block]:
    """Yield the entries of a block, by its class or its base classes."""
    kinds = [
        f'{place}.{cls.__name__}'
        for cls in type(block).__mro__
        for place in (cls.__module__.partition('.')[0], cls.__module__)
    ]
    for known in BLOCKS:
        if any(re.fullmatch(known.kind, kind) for kind in kinds):
            yield known


def as_patterns(option: str, value: Union[str, Sequence[str]]) -> list[str]:
    """Patterns of an option as a list; one alone may be without brackets.

    Raises:
        ValueError: If it is no list, or one is no regular expression.
    """
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple, set)):
        raise ValueError(f'{option}={value!r} must be a list of patterns')
    for pattern in patterns:
        check_pattern(option, pattern)
    return list(patterns)


def match(
    module: nn.Module, targets: Union[Target, Sequence[Target]]
) -> dict[str, str]:
    """Find all submodules that a target matches by its whole name.

    Args:
        module (nn.Module): What they are in.
        targets (Sequence[Target]): Patterns, or pairs of a pattern and
            letters of 'qkv'; one alone may be without brackets.

    Returns:
        dict[str, str]: Names in the order of the modules, and letters; ''
        where a target has none.

    Raises:
        ValueError: If a pattern matches nothing; nearly right names are
            named.
    """
    if isinstance(targets, str) or _is_pair(targets):
        targets = [targets]
    check_targets(targets, 'layers.*')
    names = [name for name, _ in module.named_modules() if name]
    found = {}
    for target in targets:
        pattern, inputs = target if _is_pair(target) else (target, '')
        as_patterns('targets', [pattern])
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            near = [name for name in names if re.search(pattern, name)]
            leaves = [
                name
                for name, child in module.named_modules()
                if isinstance(child, (nn.Linear, nn.Conv2d))
            ]
            hint = (
                f'it is found inside {near[:3]}, but must match the whole name'
                if near
                else f'linear layers are named like {leaves[-3:]}'
            )
            raise ValueError(
                f'target {pattern!r} matches no module of '
                f'{type(module).__name__}: {hint}'
            )
        for name in hits:
            if found.setdefault(name, inputs) != inputs:
                raise ValueError(
                    f'targets choose inputs {found[name]!r} and {inputs!r} '
                    f'of {name}; a layer has one adapter'
                )
    return {name: found[name] for name in names if name in found}


def _is_pair(target: object) -> bool:
    """Return whether a target has inputs: those have three letters at most."""
    return (
        isinstance(target, (tuple, list))
        and len(target) == 2
        and all(isinstance(item, str) for item in target)
        and bool(re.fullmatch('[qkv]{1,3}', target[1]))
    )
