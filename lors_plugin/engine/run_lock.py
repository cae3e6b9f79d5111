"""One training at a time in a work directory."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from mmengine.logging import print_log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = '.lock'


class WorkDirError(ValueError):
    """Another process trains in a work directory, or none can."""


@contextlib.contextmanager
def run_lock(
    work_dir: Union[str, Path], ignore: bool = False
) -> Iterator[None]:
    """Hold the lock of a work directory.

    The system releases it however the process ends. It is not inherited by
    workers, and it works across machines where the file system has locks.

    Args:
        work_dir (str | Path): Made if it is missing.
        ignore (bool): Go on although another process holds the lock.

    Raises:
        WorkDirError: If another process holds it, which the message names,
            or if the directory cannot be made or written to.
    """
    path = Path(work_dir) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, 'a+')  # noqa: SIM115
    except OSError as error:
        raise WorkDirError(
            f'the work directory {work_dir} cannot be written to '
            f'({error.strerror}); choose another --work-dir'
        ) from error
    with file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            problem = f'{work_dir} is in use by {file.read().strip()}'
            if not ignore:
                raise WorkDirError(
                    f'{problem}. Two runs would overwrite the checkpoints of '
                    'each other: wait for it, end it, or choose another '
                    '--work-dir. --ignore-lock starts all the same'
                ) from None
            print_log(f'--ignore-lock: {problem}', logger='current')
        except OSError as error:
            print_log(
                f'{work_dir} cannot be locked ({error}); see to it that no '
                'other run uses it',
                logger='current',
            )
        else:
            file.truncate(0)
            file.write(
                f'process {os.getpid()} on {socket.gethostname()}, started '
                f'{time.strftime("%Y-%m-%d %H:%M:%S")}: '
                f'{" ".join(sys.argv)}\n'
            )
            file.flush()
        yield
