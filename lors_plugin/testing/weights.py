"""Weights that hide nothing: by rule, or at random."""

import zlib

import numpy as np
import torch
from torch import nn


def rule_weight(key: str, shape, seed: int, kind: str) -> np.ndarray:
    """The weight that a golden "by rule" was made with.

    Args:
        key (str): Original state-dict key.
        shape (Sequence[int]): Shape of the weight.
        seed (int): Seed of the golden.
        kind (str): 'norm' for weights around 1, anything else otherwise.

    Returns:
        np.ndarray: float32 (int64 zeros for ``num_batches_tracked``).
    """
    rng = np.random.default_rng((zlib.crc32(key.encode()) + seed) % 2**32)
    weight = rng.standard_normal(shape).astype(np.float32)
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    if key.endswith('running_var'):
        return (np.abs(weight) * 0.2 + 0.8).astype(np.float32)
    if key.endswith('running_mean'):
        return (weight * 0.1).astype(np.float32)
    if len(shape) <= 1:
        centre = float(kind == 'norm' and key.endswith('weight'))
        return (weight * 0.1 + centre).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (weight / np.sqrt(fan_in)).astype(np.float32)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where fresh ones are 0 or 1.

    Tests on fresh norms and zero-initialised layers cannot see mistakes.
    """
    with torch.no_grad():
        for key, value in model.state_dict().items():
            kind = 'norm' if 'norm' in key or 'bn' in key else 'other'
            value.copy_(
                torch.from_numpy(
                    np.asarray(rule_weight(key, value.shape, seed, kind))
                )
            )
    return model
