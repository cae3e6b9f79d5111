"""Check the Triton kernels on the GPU at hand before ``'auto'`` takes them.

A kernel can be wrong, slow, or end the process on a GPU that it has not met.
A child process therefore runs each of them beside the PyTorch operators
(``probe.py``), under a time limit (``run.py``), and what it found is kept as a
verdict per card and software (``verdict.py``, ``cache.py``). This file answers
``'auto'``.
"""

import functools
import os
from typing import Optional

import torch

from ..backend import tf32_allowed
from . import cache
from .card import Card, find_card
from .run import Limits, check, run
from .verdict import (
    CacheError,
    Group,
    SelfCheckError,
    Verdict,
    groups_of,
    new_verdict,
)

ENV_NAME = 'LORS_PLUGIN_SELF_CHECK'
COMMAND = 'python -m lors_plugin.doctor --gpu'

__all__ = [
    'CacheError',
    'Card',
    'Group',
    'Limits',
    'SelfCheckError',
    'Verdict',
    'agree',
    'check',
    'decide',
    'find_card',
    'find_verdict',
    'forget',
    'groups_of',
    'is_off',
    'kind_of',
    'new_verdict',
    'run',
]

# What all ranks of a distributed run may take, None before they agreed.
_agreed: Optional[frozenset] = None


def decide(
    operator: str, dtype: torch.dtype, index: Optional[int]
) -> tuple[bool, str]:
    """Say whether ``'auto'`` takes the kernels of an operator.

    Reads the verdict of the card once per process and runs nothing.

    Args:
        operator (str): 'mixing', 'low_rank_mixing' or 'sampling'.
        dtype (torch.dtype): Type of the products.
        index (int, optional): Number of the GPU; None for the current.

    Returns:
        tuple[bool, str]: Yes or no, and the reason.
    """
    group = f'{operator} {kind_of(dtype, index)}'
    if is_off():
        return False, f'{ENV_NAME}=off: kernels are not checked, nor taken'
    if _is_distributed() and _agreed is None:
        return False, (
            'all ranks of a distributed run have to agree on the kernels '
            'first: tools/train.py and tools/test.py see to it, elsewhere '
            "add dict(type='lors_plugin.KernelCheckHook') to custom_hooks"
        )
    verdict, reason = find_verdict(index)
    if verdict is None:
        return False, reason
    taken, reason = verdict.decide(group)
    if taken and _is_distributed() and group not in _agreed:
        return False, f'another rank does not take the kernels of {group}'
    return taken, reason


@functools.cache
def find_verdict(index: Optional[int]) -> tuple[Optional[Verdict], str]:
    """Return the verdict on a card, or None and the reason."""
    card = find_card(index)
    try:
        verdict = cache.read(card)
    except SelfCheckError as error:
        return None, str(error)
    if verdict is None:
        return None, (
            f'the kernels have not been checked on this {card.name} with '
            f'these versions; `{COMMAND}` does it once, in some minutes'
        )
    return verdict, ''


def agree(index: Optional[int] = None) -> frozenset:
    """Agree with all ranks on the kernels that ``'auto'`` takes.

    In a distributed run, all ranks have to call this once, before the first
    forward pass; a kernel is taken where every rank would. Costs one
    collective of a few hundred bytes.

    Args:
        index (int, optional): Number of this rank's GPU; None for the
            current.

    Returns:
        frozenset[str]: Operators and types, such as 'mixing float16'.
    """
    global _agreed
    verdict = None if is_off() else find_verdict(index)[0]
    mine = frozenset() if verdict is None else verdict.taken
    everyone = [mine]
    if _is_distributed():
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
    _agreed = frozenset.intersection(*everyone)
    return _agreed


def forget() -> None:
    """Read verdicts again, and agree again, when asked next."""
    global _agreed
    _agreed = None
    find_verdict.cache_clear()


def is_off() -> bool:
    """Return whether the environment switches the self-check off.

    Raises:
        ValueError: If the variable is neither 'off' nor empty.
    """
    value = os.environ.get(ENV_NAME, '').strip().lower()
    if value not in ('', 'off'):
        raise ValueError(f"{ENV_NAME}={value!r} must be 'off' or unset")
    return value == 'off'


def kind_of(dtype: torch.dtype, index: Optional[int]) -> str:
    """Return the type of the products: 'float32', 'tf32', 'float16' ..."""
    if dtype == torch.float32 and tf32_allowed():
        capability = torch.cuda.get_device_capability(index)
        return 'tf32' if capability >= (8, 0) else 'float32'
    return str(dtype).removeprefix('torch.')


def _is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
