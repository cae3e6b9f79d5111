"""The notice that a process is about to be stopped.

Slurm and providers of spot machines send SIGTERM or SIGUSR1 some time before
they kill a job.
"""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from mmengine.dist import all_reduce, get_world_size
from torch.utils.data import DataLoader

SIGNALS = [
    getattr(signal, name)
    for name in ('SIGTERM', 'SIGUSR1')
    if hasattr(signal, name)
]


class StopNotice:
    """Remember that a signal asked this process to stop.

    Attributes:
        received (str, optional): The name of the signal, on this rank.
    """

    def __init__(self) -> None:
        self.received: Optional[str] = None
        self._former: dict[int, Any] = {}
        self._process = os.getpid()

    def listen(self) -> None:
        """From now on remember the signals instead of ending by them."""
        # Python lets no other thread handle signals.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        """Let the signals do again what they did before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop; all ranks call this."""
        if get_world_size() == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None))
        all_reduce(flag, 'max')
        return bool(flag)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() == self._process:
            self.received = signal.Signals(number).name
        elif number == signal.SIGTERM:
            # A forked child: pools of processes end theirs in this way, and
            # wait for them.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def shield_workers(loader: DataLoader) -> None:
    """Let the workers of a loader outlive a notice.

    It often goes to the whole group of processes, and a step needs its data
    to be finished. Workers end when their parent tells them to, or is gone.

    Args:
        loader (DataLoader): Its workers are not running yet.
    """
    if hasattr(signal, 'sigwaitinfo'):  # macOS has none
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)


def _init_worker(configured: Optional[Callable], worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if configured is not None:
        configured(worker)


def _end_with_parent() -> None:
    """End the process if it is the parent that sends SIGTERM."""
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        terminated = received.si_signo == signal.SIGTERM
        if terminated and received.si_pid == os.getppid():
            os._exit(0)
