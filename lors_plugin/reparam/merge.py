"""Merge in two phases: compute and check the whole model, then write."""

import torch
from torch import nn

from .checks import MergeError, check_evaluating
from .plan import has_simpler, plan

_RECORD = '_lors_plugin_merged'


@torch.no_grad()
def reparameterize(model: nn.Module, convert: bool = True) -> int:
    """Merge everything that can merge, in place.

    Adapters go into the layers behind them. A module with a method
    ``merged()``, which returns a simpler module that does the same in
    evaluation mode, gives way to that one everywhere in the model; adapters
    and other such modules inside of it merge first. Blocks of ParameterNet
    on a CPU are converted for inference there: their norms are folded, and
    they refuse to train. All is computed in float64 for the whole model and
    checked before the first weight is written. Merging again changes
    nothing; :func:`unmerge` brings every former weight and module back bit
    for bit.

    Args:
        model (nn.Module): In evaluation mode.
        convert (bool): Whether to convert blocks for inference on CPUs.
            Defaults to True.

    Returns:
        int: How many modules were merged.

    Raises:
        MergeError: If a part that merges trains, its weights are sharded or
            on the meta device, or a new weight is not finite. Nothing is
            changed then.
    """
    if model.training:
        check_evaluating(model, 'the model')
    if has_simpler(model):
        raise MergeError(
            f'the model itself is a {type(model).__name__}, for which '
            'another module steps in: use model.merged() instead'
        )
    merges = plan(model, convert)
    for merge in merges:
        merge.prepare()
    for merge in merges:
        merge.apply()
    if merges:
        record = getattr(model, _RECORD, [])
        object.__setattr__(model, _RECORD, [*record, *merges])
    return sum(merge.size for merge in merges)


@torch.no_grad()
def unmerge(model: nn.Module) -> int:
    """Take :func:`reparameterize` back, bit for bit.

    Args:
        model (nn.Module): The very model that was merged.

    Returns:
        int: How many modules were restored; 0 if none was merged.
    """
    merges = getattr(model, _RECORD, [])
    for merge in reversed(merges):
        merge.undo()
    if merges:
        object.__delattr__(model, _RECORD)
    return sum(merge.size for merge in merges)
