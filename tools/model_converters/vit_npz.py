"""Convert a vision transformer of the original JAX program to OpenMMLab keys.

The ViTs of ImageNet-21k are published as ``.npz`` files, ``ViT-B_16.npz`` for
example. A classifier in the file is left out.

Example:
    python tools/model_converters/vit_npz.py ViT-B_16.npz \
        checkpoints/vit-base-p16_in21k.pth
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from command_line import run
from torch import Tensor

from lors_plugin.checkpoints import ConversionError, save_checkpoint_file
from lors_plugin.checkpoints.files import check_is_file

logger = logging.getLogger('model_converters')

BLOCK = 'Transformer/encoderblock_{}/'
ATTENTION = 'MultiHeadDotProductAttention_1/'
# Parts that nothing of the backbone needs.
LEFT_OUT = ('head/', 'pre_logits/')


def convert_block(
    take: Mapping[str, np.ndarray], layer: str
) -> dict[str, np.ndarray]:
    """Rename and turn the weights of one block.

    Args:
        take (dict[str, np.ndarray]): Weights of the block; dense layers have
            the shape (in, out), those of attention have heads as a dimension
            of its own.
        layer (str): Its name in the ``VisionTransformer``, with a dot.

    Returns:
        dict[str, np.ndarray]: Weights for MMPretrain.
    """
    target = {}
    for name, norm in (('ln1', 'LayerNorm_0'), ('ln2', 'LayerNorm_2')):
        target[f'{layer}{name}.weight'] = take[f'{norm}/scale']
        target[f'{layer}{name}.bias'] = take[f'{norm}/bias']
    parts = [f'{ATTENTION}{part}/' for part in ('query', 'key', 'value')]
    width = len(take[f'{parts[0]}kernel'])
    target[f'{layer}attn.qkv.weight'] = np.concatenate(
        [take[f'{part}kernel'].reshape(width, -1).T for part in parts]
    )
    target[f'{layer}attn.qkv.bias'] = np.concatenate(
        [take[f'{part}bias'].reshape(-1) for part in parts]
    )
    out = take[f'{ATTENTION}out/kernel']
    target[f'{layer}attn.proj.weight'] = out.reshape(-1, out.shape[-1]).T
    target[f'{layer}attn.proj.bias'] = take[f'{ATTENTION}out/bias']
    for name, dense in (('layers.0.0', 'Dense_0'), ('layers.1', 'Dense_1')):
        target[f'{layer}ffn.{name}.weight'] = take[
            f'MlpBlock_3/{dense}/kernel'
        ].T
        target[f'{layer}ffn.{name}.bias'] = take[f'MlpBlock_3/{dense}/bias']
    return target


def map_keys(source: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename and turn all weights.

    Args:
        source (dict[str, np.ndarray]): Content of the file.

    Returns:
        dict[str, Tensor]: State dict of MMPretrain's ``VisionTransformer``.
    """
    source = {k: v for k, v in source.items() if not k.startswith(LEFT_OUT)}
    count = 0
    target = {}
    used = set()
    try:
        target['cls_token'] = source['cls']
        target['pos_embed'] = source[
            'Transformer/posembed_input/pos_embedding'
        ]
        target['patch_embed.projection.weight'] = source[
            'embedding/kernel'
        ].transpose(3, 2, 0, 1)
        target['patch_embed.projection.bias'] = source['embedding/bias']
        target['ln1.weight'] = source['Transformer/encoder_norm/scale']
        target['ln1.bias'] = source['Transformer/encoder_norm/bias']
        while any(key.startswith(BLOCK.format(count)) for key in source):
            prefix = BLOCK.format(count)
            block = {
                key.removeprefix(prefix): value
                for key, value in source.items()
                if key.startswith(prefix)
            }
            used |= {prefix + key for key in block}
            target |= convert_block(block, f'layers.{count}.')
            count += 1
    except KeyError as error:
        raise ConversionError(
            f'{error.args[0]} is missing: not a ViT of the JAX program'
        ) from None
    if not count or len(source) - len(used) != 6:
        raise ConversionError('not a plain ViT of the JAX program')
    return {
        key: torch.from_numpy(np.ascontiguousarray(value, np.float32))
        for key, value in target.items()
    }


def convert(src: str | Path, dst: str | Path) -> None:
    """Convert a file.

    Args:
        src (str or Path): The ``.npz`` file.
        dst (str or Path): Checkpoint to write, with ``state_dict`` (keys of
            a classifier, ``backbone.``) and ``meta``.
    """
    check_is_file(src)
    try:
        with np.load(src, allow_pickle=False) as file:
            target = map_keys(dict(file))
    except ConversionError:
        raise
    except Exception as error:
        # Reading a damaged file may raise anything.
        raise ConversionError(f'{src} is no .npz file: {error}') from error
    meta = dict(source=Path(src).name)
    state = {f'backbone.{key}': value for key, value in target.items()}
    save_checkpoint_file(dict(state_dict=state, meta=meta), dst)
    logger.info('%s: %d tensors', dst, len(target))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run(
        convert,
        'Convert a ViT of the JAX program to OpenMMLab keys',
        'the .npz file',
        argv,
    )


if __name__ == '__main__':
    sys.exit(main())
