"""Goldens of RepAdapter: the adapter, the layer behind it, their merge."""

import torch
from torch import nn

from lors_plugin.adapters import inject_adapters
from lors_plugin.reparam import reparameterize

from .golden import Errors, Golden, relative_error


def check_rep_adapter(golden: Golden) -> Errors:
    """Adapt a linear layer, merge it, and compare with the original.

    Args:
        golden (Golden): Of kind 'rep_adapter'.

    Returns:
        dict[str, float]: Largest relative error of every entry; ``merged
        out`` is the merged layer against the original's adapted output.
    """
    weight = golden.tensor('base_weight')
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict(dict(weight=weight, bias=golden.tensor('base_bias')))
    original = golden.original_weights()
    model = nn.ModuleDict(dict(layer=layer)).eval()
    inject_adapters(
        model,
        module='',
        targets=['layer'],
        hidden_dims=original['conv_A.weight'].shape[0],
        groups=int(golden.tensor('groups')),
        scale=float(golden.tensor('scale')),
    )
    layer.rep_adapter.load_state_dict(original)
    x = golden.tensor('x')
    with torch.no_grad():
        errors = {
            'adapted': relative_error(
                layer.rep_adapter(x), golden.tensor('adapted')
            ),
            'out': relative_error(layer(x), golden.tensor('out')),
        }
        reparameterize(model)
        errors['merged out'] = relative_error(layer(x), golden.tensor('out'))
    for name in ('weight', 'bias'):
        errors[f'merged_{name}'] = relative_error(
            getattr(layer, name), golden.tensor(f'merged_{name}')
        )
    return errors
