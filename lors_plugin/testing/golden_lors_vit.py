"""Goldens of LORS in a transformer: attention and FFN of each layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lors_plugin.lors import share_stack

from .golden import Errors, Golden, relative_error

# Key of the original, with the number of the layer left open -> our layer.
KINDS = {
    'attn.qkv': (
        'attn.qkv',
        'attn.qkv_private.{}',
        'attn.bias_per_layer.{}.0',
    ),
    'attn.proj': (
        'attn.proj',
        'attn.proj_private.{}',
        'attn.bias_per_layer.{}.1',
    ),
    'ffn.0': (
        'ffn.layers.0.0',
        'ffn.layers_private.{}.0',
        'ffn.bias_per_layer.{}.0',
    ),
    'ffn.1': (
        'ffn.layers.1.0',
        'ffn.layers_private.{}.1',
        'ffn.bias_per_layer.{}.1',
    ),
}


def check_lors_vit(golden: Golden) -> Errors:
    """Build a plain stack, let it share, and compare every output.

    Args:
        golden (Golden): Of kind 'lors_vit'.

    Returns:
        dict[str, float]: Largest relative error of every entry.
    """
    config = golden.json('config')
    width, depth = config['embed_dims'], config['num_layers']
    layers = nn.ModuleList(
        nn.ModuleDict(
            dict(
                attn=nn.ModuleDict(
                    dict(
                        qkv=nn.Linear(width, 3 * width),
                        proj=nn.Linear(width, width),
                    )
                ),
                ffn=nn.ModuleList(
                    [
                        nn.Linear(width, config['feedforward_channels']),
                        nn.Linear(config['feedforward_channels'], width),
                    ]
                ),
            )
        )
        for _ in range(depth)
    )
    share_stack(
        layers,
        targets=[
            dict(
                pattern=rf'(\d+)\.{kind}',
                ranks=config[f'{kind.split(".")[0]}_ranks'],
            )
            for kind in KINDS
        ],
    )
    layers.load_state_dict(from_original(golden.original_weights(), depth))
    errors = {}
    x = golden.tensor('x')
    act = getattr(nn, config['act'])()
    with torch.no_grad():
        # Every layer was run on the same input.
        for i, layer in enumerate(layers):
            hidden = act(layer['ffn'][0](x))
            outputs = dict(
                attn=_attend(layer['attn'], x, config['num_heads']),
                ffn=x + layer['ffn'][1](hidden),
            )
            for name, value in outputs.items():
                key = f'layer{i}_{name}'
                errors[key] = relative_error(value, golden.tensor(key))
    return errors


def from_original(
    original: dict[str, Tensor], depth: int
) -> dict[str, Tensor]:
    """The original's weights under our names.

    Args:
        original (dict[str, Tensor]): State dict of the original.
        depth (int): Number of layers.

    Returns:
        dict[str, Tensor]: State dict of the shared stacks.
    """
    state = {}
    for kind, (shared, private, bias) in KINDS.items():
        state[f'0.{kind}.shared_weight'] = original[f'{shared}.weight']
        for i in range(depth):
            at = f'{i}.{kind}'
            state[f'{at}.down'] = original[f'{private.format(i)}.0.weight']
            state[f'{at}.up'] = original[f'{private.format(i)}.1.weight']
            state[f'{at}.bias'] = original[bias.format(i)]
    return state


def _attend(attn: nn.ModuleDict, x: Tensor, heads: int) -> Tensor:
    qkv = attn['qkv'](x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(*qkv)
    return attn['proj'](out.transpose(1, 2).flatten(2))
