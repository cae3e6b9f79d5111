"""Verdicts: errors and times of the kernels on a card."""

import dataclasses
import datetime
from typing import Optional

from .card import Card

OPERATORS = ('low_rank_mixing', 'mixing', 'sampling')
# The first ones are what most trainings use.
KINDS = ('float16', 'float32', 'bfloat16', 'tf32')
FULL_CAPABILITY = (8, 0)  # has bfloat16 and TF32
FORMAT = 1


class SelfCheckError(RuntimeError):
    """The check could not be run."""


class CacheError(SelfCheckError):
    """Verdicts cannot be kept, or are not trusted."""


def groups_of(card: Card) -> list[str]:
    """Return what is checked on a card: operators in types.

    Sampling runs in float32 always and multiplies no matrices.
    """
    capability = tuple(map(int, card.capability.split('.')))
    full = capability >= FULL_CAPABILITY
    kinds = KINDS if full else ('float16', 'float32')
    found = [f'{name} {kind}' for kind in kinds for name in OPERATORS[:2]]
    return [*found[:2], 'sampling float32', *found[2:]]


@dataclasses.dataclass(frozen=True)
class Group:
    """An operator in a type, forward and backward.

    Attributes:
        status (str): 'faster' (right, and faster than the PyTorch operators
            at every size that was timed), 'slower', 'wrong', 'crashed',
            'hung', 'failed' or 'untried'.
        reason (str): A sentence.
        sizes (tuple[dict]): What was measured: ``size`` (name), ``errors``
            (error and what is allowed by name of the result), ``ms``
            (Triton and PyTorch by mode) and ``bandwidth`` (GB/s of forward,
            and of a copy).
    """

    status: str
    reason: str
    sizes: tuple[dict, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All that was found out about the kernels on a card.

    Attributes:
        card (Card): The card and all versions.
        date (str): When it was found, ISO 8601.
        seconds (float): How long that took.
        groups (dict[str, Group]): By operator and type.
    """

    card: Card
    date: str
    seconds: float
    groups: dict[str, Group]

    @property
    def taken(self) -> frozenset:
        """Groups whose kernels ``'auto'`` takes."""
        return frozenset(
            name for name, g in self.groups.items() if g.status == 'faster'
        )

    def decide(self, group: str) -> tuple[bool, str]:
        """Say whether ``'auto'`` takes a kernel, and why."""
        found = self.groups.get(group)
        if found is None:
            return False, f'the self-check of {self.date} has no {group}'
        reason = f'{group} on {self.card.name}: {found.reason}'
        return found.status == 'faster', f'{reason} (checked {self.date})'


def new_verdict(card: Card, seconds: float, groups: dict) -> Verdict:
    """Make a verdict of today."""
    today = datetime.date.today().isoformat()
    return Verdict(card, today, round(seconds, 1), groups)


def judge(sizes: list[dict]) -> Group:
    """Judge an operator by what was measured at all sizes.

    Args:
        sizes (list[dict]): As in :class:`Group`.
    """
    wrong = [
        (error, allowed, f'{name} at size {each["size"]}')
        for each in sizes
        for name, (error, allowed) in each['errors'].items()
        if not error <= allowed  # NaN too
    ]
    if wrong:
        error, allowed, where = max(wrong, key=lambda w: w[0] / w[1])
        reason = (
            f'wrong, {where} has a relative error of {error:.1e}, allowed '
            f'is {allowed:.1e}'
        )
        return Group('wrong', reason, tuple(sizes))
    ratios = {
        f'{mode} at size {each["size"]}': torch_ms / triton_ms
        for each in sizes
        for mode, (triton_ms, torch_ms) in each['ms'].items()
    }
    if not ratios:
        return Group('failed', 'failed (nothing was timed)', tuple(sizes))
    where = min(ratios, key=ratios.get)
    if ratios[where] <= 1:
        reason = (
            f'right, but {where} takes {1 / ratios[where]:.2f} times as long '
            'as the PyTorch operators'
        )
        return Group('slower', reason, tuple(sizes))
    reason = (
        f'right, and takes {1 / max(ratios.values()):.2f} to '
        f'{1 / ratios[where]:.2f} of the time of the PyTorch operators'
    )
    return Group('faster', reason, tuple(sizes))


def to_json(verdict: Verdict) -> dict:
    """Return a verdict as plain data."""
    return dict(format=FORMAT, **dataclasses.asdict(verdict))


def from_json(content: dict) -> Optional[Verdict]:
    """Return the verdict that plain data describe, None for other formats.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If they describe
            none.
    """
    if content['format'] != FORMAT:
        return None
    groups = {
        str(name): Group(
            str(group['status']), str(group['reason']), tuple(group['sizes'])
        )
        for name, group in content['groups'].items()
    }
    return Verdict(
        Card(**content['card']),
        str(content['date']),
        float(content['seconds']),
        groups,
    )
