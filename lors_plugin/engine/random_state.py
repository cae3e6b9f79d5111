"""Save and restore the states of all random number generators."""

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank


def gather_random_states() -> list[dict[str, Any]]:
    """Collect the random states of all ranks; every rank calls this.

    Returns:
        list[dict]: One per rank, of tensors and plain values.
    """
    name, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return all_gather_object(state)


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Restore the random states of this rank.

    Args:
        states (list[dict]): Of :func:`gather_random_states`.
    """
    state = states[get_rank()]
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
