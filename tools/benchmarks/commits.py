"""Run a case with the package of another checkout, in a child process.

The child imports ``lors_plugin`` from the other checkout and everything else
from this folder. It checks its implementations against its own reference and
runs them when asked, so that both commits are timed in turns.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import torch
from harness import GateError, Implementation

RUN = Path(__file__).with_name('run.py')
MARK = '--serve'


class OtherCommit:
    """The child process.

    Args:
        folder (Path): A checkout of this project.
        threads (int, optional): As ``--threads``.
    """

    def __init__(self, folder: Path, threads: Optional[int] = None) -> None:
        self.folder = folder.resolve()
        paths = [str(self.folder), os.environ.get('PYTHONPATH', '')]
        paths = os.pathsep.join(filter(None, paths))
        # Answers have a pipe of their own: what is imported may print.
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), MARK, str(write)],
            stdin=subprocess.PIPE,
            stdout=2,  # prints over there go to standard error
            env=dict(os.environ, PYTHONPATH=paths),
            pass_fds=[write],
        )
        os.close(write)
        self.answers = os.fdopen(read, 'rb')
        found = Path(self.ask('start', threads))
        if found != self.folder:
            self.close()
            raise ValueError(
                f'{folder} is no checkout of lors_plugin: Python imports it '
                f'from {found}'
            )

    def ask(self, *request):
        """Send a request and return the answer; raise what it raised."""
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        try:
            failed, answer = pickle.load(self.answers)
        except EOFError:
            code = self.process.wait()
            raise RuntimeError(
                f'the process of {self.folder} ended with code {code}'
            ) from None
        if failed:
            raise failed(f'in {self.folder}: {answer}')
        return answer

    def prepare(self, *request) -> tuple[list['Remote'], dict]:
        """As ``run.prepare``, over there."""
        found, errors = self.ask('prepare', *request)
        remotes = [Remote(self, *each) for each in found]
        suffix = f'@{self.folder.name}'
        return remotes, {name + suffix: e for name, e in errors.items()}

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


class Remote:
    """An implementation of the other commit.

    Args:
        commit (OtherCommit): Where it runs.
        label, name, dtype (str): As of :class:`Implementation`.
    """

    facts: dict = {}

    def __init__(self, commit, label: str, name: str, dtype: str) -> None:
        suffix = f'@{commit.folder.name}'
        self.label, self.name = label + suffix, name + suffix
        self.dtype = dtype
        self._commit, self._label = commit, label

    def time(self, modes: Sequence[str], clock: str) -> dict[str, float]:
        """See :meth:`Implementation.time`."""
        return self._commit.ask('time', self._label, modes, clock)

    def memory(self, modes: Sequence[str]) -> list[tuple[str, str, int]]:
        """See :meth:`Implementation.memory`."""
        return self._commit.ask('memory', self._label, modes)


def serve(prepare: Callable, file: int) -> None:
    """Answer requests on standard input until it ends.

    Args:
        prepare (Callable): ``run.prepare``.
        file (int): Descriptor of the pipe for answers.
    """
    import lors_plugin

    answers = os.fdopen(file, 'wb')
    ready: dict[str, Implementation] = {}

    def answer(kind, *rest):
        if kind == 'start':
            if rest[0]:
                torch.set_num_threads(rest[0])
            return str(Path(lors_plugin.__file__).resolve().parents[1])
        if kind == 'prepare':
            ready.clear()
            found, errors = prepare(*rest)
            ready.update({each.label: each for each in found})
            return [(e.label, e.name, e.dtype) for e in found], errors
        return getattr(ready[rest[0]], kind)(*rest[1:])

    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = None, answer(*request)
        except (GateError, torch.OutOfMemoryError) as error:
            reply = type(error), str(error)
        except Exception:
            reply = RuntimeError, traceback.format_exc()
        pickle.dump(reply, answers)
        answers.flush()
