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
from pathlib import Path
from typing import Optional

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
        start (float): Until PyTorch is loaded and the GPU answers.
        step (float): For an operator at one size: compilation, forward,
            backward and timing.
        total (float): For everything.
        wait (float): For the check of another process, beyond its total.
    """

    start: float = 120
    step: float = 120
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
    if not force:
        found = cache.read(card)
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
    todo, groups = groups_of(card), {}
    while todo:
        left = start + limits.total - time.monotonic()
        if left <= 0:
            for name in todo:
                groups[name] = Group('untried', 'not tried, time was up')
            break
        # After a crash the rest goes on in a new process.
        found, culprit = _run_child(todo, device, command, limits, left)
        groups.update(found)
        if culprit is None and not found:
            raise SelfCheckError('the probe of the kernels did nothing')
        if culprit is not None:
            groups[culprit[0]] = culprit[1]
        todo = [name for name in todo if name not in groups]
    order = {name: groups[name] for name in groups_of(card)}
    return new_verdict(card, time.monotonic() - start, order)


def _run_child(
    todo: Sequence[str],
    device: str,
    command: Sequence[str],
    limits: Limits,
    left: float,
) -> tuple[dict[str, Group], Optional[tuple[str, Group]]]:
    """Run one process; return what it judged, and what ended it if any.

    Raises:
        SelfCheckError: If it ended before it came to a kernel.
    """
    paths = [str(OPS.parents[1]), os.environ.get('PYTHONPATH', '')]
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))
    )
    with tempfile.TemporaryDirectory(prefix='lors_plugin-') as folder:
        events, log = Path(folder, 'events'), Path(folder, 'log')
        events.touch()
        with log.open('wb') as output:
            process = subprocess.Popen(
                [
                    *(*command, '--device', device, '--output', str(events)),
                    *('--limit', str(int(left) + 1), '--attended', *todo),
                ],
                stdin=subprocess.PIPE,  # closes if this process ends
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        try:
            seen = _Events(events)
            limit, what = limits.start, ''
            until = time.monotonic() + left
            deadline = time.monotonic() + limit
            while process.poll() is None:
                if seen.read():
                    limit = limits.step
                    deadline = time.monotonic() + limit
                now = time.monotonic()
                if now > min(deadline, until):
                    what = 'time'
                    break
                time.sleep(0.05)
            out_of_time = now > until if what else False
        finally:
            _end(process)
        seen.read()
        said = _last_line(log)
    if seen.group is None:
        if not seen.done and (what or process.returncode):
            raise SelfCheckError(
                'the kernels cannot be checked: '
                + (
                    f'PyTorch and the GPU did not answer within {limit:.0f} s'
                    if what
                    else said or _how_it_ended(process)
                )
            )
        return seen.done, None
    if out_of_time:
        group = Group('untried', 'not finished, time was up')
    elif what:
        group = Group('hung', f'did not end within {limit:.0f} s')
    elif process.returncode < 0:
        group = Group('crashed', f'ended the process ({_signal(process)})')
    else:
        said = said or _how_it_ended(process)
        group = Group('failed', f'failed ({said})')
    return seen.done, (seen.group, group)


class _Events:
    """Read the events of the probe so far, a line of JSON each.

    Args:
        path (Path): Its file.
    """

    def __init__(self, path: Path) -> None:
        self.done: dict[str, Group] = {}
        self.group: Optional[str] = None  # that it is at
        self._sizes: list[dict] = []
        self._path, self._at = path, 0

    def read(self) -> bool:
        """Read on; return whether there was anything."""
        with self._path.open('rb') as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind(b'\n') + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                raise SelfCheckError(
                    f'the probe of the kernels wrote {line[:100]!r}'
                ) from None
            if 'begin' in event:
                self.group, self._sizes = event['begin'], []
            elif 'size' in event:
                self._sizes.append(event)
            elif 'end' in event:
                self.done[event['end']] = judge(self._sizes)
                self.group = None
        return bool(whole)


def _end(process: subprocess.Popen) -> None:
    """End a process and its children, however it is."""
    if process.poll() is None:
        # It leads a group of its own, with what it started.
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in the driver cannot be ended, and is not waited for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.stdin.close()


def _signal(process: subprocess.Popen) -> str:
    try:
        return signal.Signals(-process.returncode).name
    except ValueError:
        return f'signal {-process.returncode}'


def _how_it_ended(process: subprocess.Popen) -> str:
    if process.returncode < 0:
        return f'the probe ended by {_signal(process)}'
    return f'the probe ended with code {process.returncode}'


def _last_line(path: Path) -> str:
    """Return the last line of a log, which names the error."""
    lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
    found = [line.strip() for line in lines if line.strip()]
    return found[-1][:300] if found else ''
