"""Merge in two phases: compute and check the whole model, then write."""

from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.adapters import adapters_of

from .plan import AdapterMerge, plan

_RECORD = '_lors_plugin_merged'


class MergeError(ValueError):
    """The model cannot be merged; nothing was changed."""


@torch.no_grad()
def reparameterize(model: nn.Module) -> int:
    """Merge everything that can merge, in place.

    Adapters go into the layers behind them. New weights are computed in
    float64 for the whole model and checked before the first is written.
    Merging again changes nothing; :func:`unmerge` brings every former weight
    back bit for bit.

    Args:
        model (nn.Module): In evaluation mode.

    Returns:
        int: How many modules were merged.

    Raises:
        MergeError: If the model trains, its weights are sharded or on the
            meta device, or a new weight is not finite. Nothing is changed
            then.
    """
    adapters = adapters_of(model).values()
    if model.training or any(adapter.training for adapter in adapters):
        raise MergeError(
            'the model or a part of it is in training mode, where dropout '
            'cannot merge; call model.eval() first'
        )
    merges = plan(model)
    written = [
        [
            (module, name, _checked(module, name, value, merge.name))
            for module, name, value in merge.values()
        ]
        for merge in merges
    ]
    for merge, params in zip(merges, written):
        for module, name, param in params:
            merge.old.append((module, name, getattr(module, name)))
            module.register_parameter(name, param)
        merge.apply()
    if merges:
        record = getattr(model, _RECORD, [])
        object.__setattr__(model, _RECORD, [*record, *merges])
    return len(merges)


@torch.no_grad()
def unmerge(model: nn.Module) -> int:
    """Take :func:`reparameterize` back, bit for bit.

    Args:
        model (nn.Module): The very model that was merged.

    Returns:
        int: How many modules were restored; 0 if none was merged.
    """
    merges: list[AdapterMerge] = getattr(model, _RECORD, [])
    for merge in reversed(merges):
        for module, name, param in merge.old:
            module.register_parameter(name, param)
        merge.undo()
        merge.old.clear()
    if merges:
        object.__delattr__(model, _RECORD)
    return len(merges)


def _checked(
    module: nn.Module, name: str, value: Tensor, where: str
) -> nn.Parameter:
    """A new parameter like the one that it replaces."""
    like: Optional[Tensor] = getattr(module, name)
    if like is None:
        like = next(module.parameters())
    if like.is_meta or hasattr(like, 'placements') or hasattr(like, 'ds_id'):
        raise MergeError(
            f'{where}: its weights are sharded or on the meta device; gather '
            'or load them before merging'
        )
    new = value.to(like.device, like.dtype)
    if not new.isfinite().all():
        raise MergeError(
            f'{where}.{name}: merging gives numbers that are not finite in '
            f'{str(like.dtype).removeprefix("torch.")}; look for NaN in the '
            'adapter and its layer, or merge in float32'
        )
    return nn.Parameter(new, requires_grad=like.requires_grad)
