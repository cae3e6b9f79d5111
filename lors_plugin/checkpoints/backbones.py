"""Keys of the backbones that the models were published with.

The key maps take a backbone over as it is; here stands what a whole one has,
so that a missing or an unknown key does not pass unseen.
"""

from collections.abc import Iterable
from typing import NamedTuple, Optional

NORM = ('weight', 'bias', 'running_mean', 'running_var')
PARTS = ('weight', 'bias')
COUNTER = 'num_batches_tracked'
BASIC = {(2, 2, 2, 2), (3, 4, 6, 3)}
BOTTLENECK = {(3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)}
SWIN = {(2, 2, 6, 2), (2, 2, 18, 2)}
# A backbone with more unknown keys than this share is one of another kind.
OTHER_KIND = 0.1


class Problems(NamedTuple):
    """Problems with the keys of a backbone.

    Attributes:
        kind (str | None): 'ResNet' (ResNeXt too) or 'Swin'; None for others,
            of which nothing is known.
        unknown (list[str]): Keys that the kind has not.
        missing (list[str]): Keys that the kind has besides.
    """

    kind: Optional[str]
    unknown: list
    missing: list


def backbone_problems(keys: Iterable[str]) -> Problems:
    """Compare with the most similar backbone that is known.

    Args:
        keys (Iterable[str]): Without the prefix ``backbone.``.

    Returns:
        Problems: Nothing where the backbone is of no known kind.
    """
    keys = set(keys)
    kind, candidates = _candidates(keys)
    if not candidates:
        return Problems(None, [], [])
    nearest = min(candidates, key=lambda known: len(known ^ keys))
    unknown, missing = sorted(keys - nearest), sorted(nearest - keys)
    if len(unknown) > OTHER_KIND * len(keys):
        return Problems(None, [], [])
    return Problems(kind, unknown, missing)


def _candidates(keys: set) -> tuple[str, list]:
    if any(key.startswith('layer1.') for key in keys):
        # BatchNorm counts its batches since torch 0.4.1.
        norm = NORM
        if any(key.endswith(COUNTER) for key in keys):
            norm = (*NORM, COUNTER)
        deformable = {
            stage
            for stage in range(1, 5)
            for key in keys
            if key.startswith(f'layer{stage}.') and '.conv_offset.' in key
        }
        return 'ResNet', [
            *(_resnet(blocks, 2, norm, set()) for blocks in BASIC),
            *(_resnet(blocks, 3, norm, deformable) for blocks in BOTTLENECK),
        ]
    if any(key.startswith('stages.0.blocks.') for key in keys):
        more = keys & {'absolute_pos_embed'}
        return 'Swin', [_swin(depths) | more for depths in SWIN]
    return 'other', []


def _resnet(
    blocks: tuple, convs: int, norm: tuple, deformable: set
) -> set[str]:
    """Keys of a ResNet of MMDetection.

    Args:
        blocks (tuple[int]): Blocks of each stage.
        convs (int): Convolutions of a block.
        norm (tuple[str]): Names in a BatchNorm.
        deformable (set[int]): Stages, from 1, whose blocks have DCN.

    Returns:
        set[str]: All keys of the state dict.
    """
    keys = {'conv1.weight', *(f'bn1.{name}' for name in norm)}
    for stage, number in enumerate(blocks, 1):
        for block in range(number):
            prefix = f'layer{stage}.{block}.'
            for i in range(1, convs + 1):
                keys.add(f'{prefix}conv{i}.weight')
                keys.update(f'{prefix}bn{i}.{name}' for name in norm)
            if stage in deformable:
                keys.update(
                    f'{prefix}conv2.conv_offset.{name}' for name in PARTS
                )
        if convs == 3 or stage > 1:
            prefix = f'layer{stage}.0.downsample.'
            keys.add(f'{prefix}0.weight')
            keys.update(f'{prefix}1.{name}' for name in norm)
    return keys


def _swin(depths: tuple) -> set[str]:
    """Keys of a Swin Transformer of MMDetection with four outputs.

    Args:
        depths (tuple[int]): Blocks of each stage.

    Returns:
        set[str]: All keys of the state dict.
    """
    linears = ['patch_embed.projection', 'patch_embed.norm']
    linears += [f'norm{i}' for i in range(len(depths))]
    keys = set()
    for stage, number in enumerate(depths):
        for block in range(number):
            prefix = f'stages.{stage}.blocks.{block}.'
            linears += [
                prefix + name
                for name in (
                    'norm1',
                    'norm2',
                    'attn.w_msa.qkv',
                    'attn.w_msa.proj',
                    'ffn.layers.0.0',
                    'ffn.layers.1',
                )
            ]
            keys.add(f'{prefix}attn.w_msa.relative_position_bias_table')
            keys.add(f'{prefix}attn.w_msa.relative_position_index')
        if stage < len(depths) - 1:
            linears.append(f'stages.{stage}.downsample.norm')
            keys.add(f'stages.{stage}.downsample.reduction.weight')
    keys.update(f'{name}.{part}' for name in linears for part in PARTS)
    return keys
