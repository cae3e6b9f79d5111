"""Run the probe in child processes, within limits, and judge what it found."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, Optional

from . import cache
from .card import OPS, Card
from .verdict import (
    Group,
    SelfCheckError,
    Verdict,
    groups_of,
    judge,
    new_verdict,
)

PROBE = (sys.executable, '-m', 'lors_plugin.ops.self_check.probe')


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds that a check may take.

    Attributes:
        step (int): For an operator in a type: compilation, forward, backward
            and timing; and for the start of a child process.
        total (float): For everything.
        wait (float): For the check of another process, beyond its total.
    """

    step: int = 180
    total: float = 480
    wait: float = 60


def check(
    card: Card,
    device: str = 'cuda',
    command: Sequence[str] = PROBE,
    force: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Return the verdict on a card; run the check if there is none yet.

    Of several processes one checks and the others wait.

    Args:
        card (Card): The card.
        device (str): The GPU to use, such as 'cuda:1'. Defaults to 'cuda'.
        command (Sequence[str]): The probe, see :mod:`.probe`; tests have
            others.
        force (bool): Check although there is a verdict. Defaults to False.
        limits (Limits): Seconds that it may take.
        say (Callable): Told once, before minutes pass.

    Returns:
        Verdict: As it is now in the cache.

    Raises:
        CacheError: If the verdict cannot be kept; without a place for it
            nothing is run.
        SelfCheckError: If the check cannot be run.
    """
    found = None if force else cache.read(card)
    if found is not None:
        return found
    with cache.lock(card, limits.total + limits.wait):
        # Another process may have written it meanwhile.
        found = None if force else cache.read(card)
        if found is not None:
            return found
        say(
            f'Checking the Triton kernels on {card.name}, once for these '
            f'versions: some minutes, {limits.total / 60:.0f} at most'
        )
        verdict = run(card, device, command, limits)
        cache.write(verdict)
    return verdict


def run(
    card: Card,
    device: str,
    command: Sequence[str] = PROBE,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Verdict:
    """Check all kernels and keep nothing, see :func:`check`."""
    start = time.monotonic()
    todo = groups_of(card)
    groups = dict.fromkeys(todo, Group('untried', 'not tried, time was up'))
    while todo:
        left = start + limits.total - time.monotonic()
        if left <= 0:
            break
        # After a crash the rest goes on in a new process.
        found = _run_child(todo, device, command, limits, left)
        groups.update(found)
        todo = [name for name in todo if name not in found]
    return new_verdict(card, time.monotonic() - start, groups)


def _run_child(
    todo: Sequence[str],
    device: str,
    command: Sequence[str],
    limits: Limits,
    left: float,
) -> dict[str, Group]:
    """Run one process; return what it judged, and what ended it if any.

    Raises:
        SelfCheckError: If it ended before it came to a kernel.
    """
    paths = [str(OPS.parents[1]), os.environ.get('PYTHONPATH', '')]
    paths = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, device, str(limits.step), *todo],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**os.environ, 'PYTHONPATH': paths},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(left)
            code = process.returncode
        finally:
            _end(process)
        lines, said = _lines(out), _lines(log)
    end = _how_it_ended(code, said, limits.step)
    found = {}
    for line in lines:
        # Libraries print, too.
        with contextlib.suppress(ValueError, AttributeError):
            for name, sizes in json.loads(line).items():
                found[name] = end if sizes is None else judge(sizes)
    if not found:
        reason = said[-1] if end.status == 'failed' and said else end.reason
        raise SelfCheckError(f'the kernels cannot be checked: {reason}')
    return found


def _how_it_ended(code: Optional[int], said: list[str], step: int) -> Group:
    """Judge a kernel at which a process ended, None if it did not."""
    if code is None:
        return Group('untried', 'not finished, time was up')
    if code == -getattr(signal, 'SIGALRM', 0):
        return Group('hung', f'did not end within {step} s')
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return Group('crashed', f'ended the process ({name})')
        return Group('crashed', f'ended the process (signal {-code})')
    text = said[-1][:300] if said else f'ended with code {code}'
    return Group('failed', f'failed ({text})')


def _end(process: subprocess.Popen) -> None:
    """End a process and its children, however it is."""
    if process.poll() is None:
        # It leads a group of its own, with what it started.
        os.killpg(process.pid, signal.SIGKILL)
        # One that hangs in the driver cannot be ended, nor waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _lines(file: BinaryIO) -> list[str]:
    file.seek(0)
    lines = file.read().decode(errors='replace').splitlines()
    return [line.strip() for line in lines if line.strip()]
