"""Weights of a plain model as those of its shared stacks."""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .linear import LowRankResidualLinear

Named = list[tuple[str, LowRankResidualLinear]]


class Factors(NamedTuple):
    """The shared weight and the factors of a stack.

    Attributes:
        shared (Tensor): Shape (out, in).
        down (list[Tensor]): A layer's ``A``, shape (rank, in).
        up (list[Tensor]): A layer's ``B``, shape (out, rank).
        error (float): Frobenius norm of what is lost, relative to the
            weights.
    """

    shared: Tensor
    down: list
    up: list
    error: float


@torch.no_grad()
def factorize(weights: Sequence[Tensor], ranks: Sequence[int]) -> Factors:
    """Bring the weights of a stack into the form ``W + B_l A_l``.

    ``W`` is their mean and ``B_l A_l`` the best approximation of that rank
    to what remains (truncated SVD). Computed in float64.

    Args:
        weights (Sequence[Tensor]): Of each layer, shape (out, in); further
            dimensions, as those of convolutions, count as ``in``.
        ranks (Sequence[int]): Of each layer; 0 leaves it the mean alone.

    Returns:
        Factors: In the dtype of the weights.
    """
    dtype = weights[0].dtype
    full = torch.stack([weight.double().flatten(1) for weight in weights])
    shared = full.mean(0)
    downs, ups, lost = [], [], 0.0
    for residual, rank in zip(full - shared, ranks):
        down, up = _truncated(residual, rank)
        lost += (residual - up @ down).square().sum().item()
        downs.append(down.to(dtype))
        ups.append(up.to(dtype))
    error = (lost / max(full.square().sum().item(), 1e-300)) ** 0.5
    return Factors(shared.to(dtype), downs, ups, error)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rank, in) and (out, rank), of equal size."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = values[:rank].sqrt()
    return scale[:, None] * right[:rank], left[:, :rank] * scale


def named_stacks(module: nn.Module) -> Iterator[tuple[list, Named]]:
    """Stacks below a module.

    Yields:
        tuple: The layers of a stack, and all names with their layers; a
        layer at two places of a model has two names.
    """
    stacks = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, LowRankResidualLinear):
            stacks.setdefault(layer.owner, []).append((name, layer))
    for named in stacks.values():
        yield list(dict.fromkeys(layer for _, layer in named)), named


def read_plain_weights(
    module: nn.Module,
    state_dict: dict,
    prefix: str = '',
    local_metadata: object = None,
    strict: object = None,
    missing_keys: object = None,
    unexpected_keys: object = None,
    error_msgs: object = None,
) -> None:
    """Load-state-dict pre-hook: replace full weights by their factors.

    It changes ``state_dict`` where it holds the full weight of every layer
    of a stack, in its shape; anything else is left to the usual messages.
    A function of the module, with no state of its own, so that copies of a
    model (EMA) use their own layers.
    """
    for layers, named in named_stacks(module):
        keys = {
            layer: f'{prefix}{name}{layer.plain_key}' for name, layer in named
        }
        shape = layers[0].weight.shape
        if any(
            key not in state_dict or state_dict[key].shape != shape
            for key in keys.values()
        ):
            continue
        factors = factorize(
            [state_dict[keys[layer]] for layer in layers],
            [layer.rank for layer in layers],
        )
        values = dict(zip(layers, zip(factors.down, factors.up)))
        for name, layer in named:
            at = f'{prefix}{name}.'
            state_dict.pop(f'{prefix}{name}{layer.plain_key}')
            if layer.owner is layer:
                state_dict[f'{at}shared_weight'] = factors.shared
            if layer.rank:
                down, up = values[layer]
                state_dict.update({f'{at}down': down, f'{at}up': up})
        print_log(
            f'{prefix}{named[0][0]} to {named[-1][0]}: full weights become '
            f'a shared one and low-rank parts; {factors.error:.1%} of their '
            'norm is lost',
            logger='current',
            level=logging.INFO,
        )
