"""Adapter presets: the layers of a backbone to adapt, by its class name.

Patterns are full matches of module names inside the backbone. Backbones are
told by the names of their classes and base classes, so that no host has to be
imported. RepAdapter, section 3.3: before the attention and before the FFN.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

from torch import nn

from lors_plugin.utils import check_choice

PLACEMENTS = ('block', 'attn', 'ffn')
# A pattern, or a pair: a pattern, and which inputs of an attention.
Target = Union[str, tuple[str, str]]


class Preset(NamedTuple):
    """The layers that get adapters in one kind of backbone.

    Attributes:
        attn (str, optional): What reads the tokens of an attention.
        ffn (str, optional): The first layer of an FFN.
    """

    attn: Optional[str]
    ffn: Optional[str]


PRESETS = {
    # mmpretrain: ViT, DINOv2, DeiT, DeiT III, CLIP, MAE, MoCo v3
    'VisionTransformer': Preset(
        r'layers\.\d+\.attn\.qkv',
        r'layers\.\d+\.ffn\.(layers\.0\.0|w12|fc1)',
    ),
    # mmpretrain: BEiT, BEiT v2, EVA
    'BEiTViT': Preset(
        r'layers\.\d+\.attn',
        r'layers\.\d+\.ffn\.(layers\.0\.0|w12)',
    ),
    'ViTEVA02': Preset(r'layers\.\d+\.attn\.qkv', r'layers\.\d+\.mlp\.w12'),
    # mmpretrain: Segment Anything; the zeros that fill up its windows are
    # adapted and merged as those of Swin are
    'ViTSAM': Preset(
        r'layers\.\d+\.attn\.qkv', r'layers\.\d+\.ffn\.layers\.0\.0'
    ),
    # mmpretrain: MViT v2
    'MViT': Preset(r'blocks\.\d+\.attn\.qkv', r'blocks\.\d+\.mlp\.fc1'),
    # mmpretrain and mmdet; zeros that fill up a window go through the adapter
    # as they go through the linear behind it, so merging stays exact
    'SwinTransformer': Preset(
        r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.qkv',
        r'stages\.\d+\.blocks\.\d+\.ffn\.layers\.0\.0',
    ),
    # mmpretrain; its attention normalises keys, see sites.py
    'SwinTransformerV2': Preset(
        None, r'stages\.\d+\.blocks\.\d+\.ffn\.layers\.0\.0'
    ),
    # mmpretrain; the depth-wise convolution is no place for an adapter
    'ConvNeXt': Preset(None, r'stages\.\d+\.\d+\.pointwise_conv1'),
    # mmdet, projects/ViTDet
    'ViT': Preset(r'blocks\.\d+\.attn\.qkv', r'blocks\.\d+\.mlp\.fc1'),
}


def find_preset(module: nn.Module) -> Preset:
    """The preset of a backbone.

    Raises:
        ValueError: If no class of the module is known.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in PRESETS:
            return PRESETS[cls.__name__]
    raise ValueError(
        f'no preset for {type(module).__name__}; there are presets for '
        f'{sorted(PRESETS)}. Give targets=[...], patterns of the layers that '
        'read the tokens'
    )


def targets_of(module: nn.Module, placement: str) -> dict[str, str]:
    """Find the layers that the preset of a backbone adapts.

    Args:
        module (nn.Module): The backbone.
        placement (str): 'block' (attention and FFN), 'attn' or 'ffn'.

    Returns:
        dict[str, str]: See :func:`match`.

    Raises:
        ValueError: If the backbone is unknown or has no such layer.
    """
    check_choice('placement', placement, PLACEMENTS)
    preset = find_preset(module)
    chosen = [
        pattern
        for part, pattern in preset._asdict().items()
        if placement in ('block', part) and pattern
    ]
    if not chosen:
        raise ValueError(
            f'{type(module).__name__} has no place for '
            f'placement={placement!r}; use placement="block"'
        )
    return match(module, chosen)


def as_patterns(option: str, value: Union[str, Sequence[str]]) -> list[str]:
    """Patterns of an option as a list; one alone may be without brackets.

    Raises:
        ValueError: If one is no regular expression.
    """
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f'{option}: {pattern!r} is no regular expression ({error})'
            ) from None
    return patterns


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
