"""Keep verdicts in the user's cache directory.

Whoever can write there could make ``'auto'`` take wrong kernels, so directory
and files have to belong to the user, and others must not be able to write.
They hold JSON.
"""

import contextlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from .card import Card
from .verdict import CacheError, SelfCheckError, Verdict, from_json, to_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_BYTES = 2**20  # of a verdict; some ten thousand are normal


def directory() -> Path:
    """Return the directory: ``$XDG_CACHE_HOME/lors_plugin``, or the one in
    ``~/.cache``."""
    base = Path(os.environ.get('XDG_CACHE_HOME', ''))
    # Relative paths are to be ignored, says the standard.
    if not base.is_absolute():
        base = Path.home() / '.cache'
    return base / 'lors_plugin'


def read(card: Card) -> Optional[Verdict]:
    """Read the verdict on a card, None if there is none.

    Raises:
        CacheError: If others than this user could have written it.
    """
    path = directory() / f'{card.key}.json'
    try:
        check_owner(path.parent)
        check_owner(path)
        # Not through a link that was put there meanwhile.
        handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0))
        with open(handle, encoding='utf-8') as file:
            check_owner(path, os.fstat(file.fileno()))
            verdict = from_json(json.loads(file.read(MAX_BYTES)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheError(f'{path} cannot be read: {error}') from error
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # damaged: as if it were not there
    return verdict if verdict and verdict.card == card else None


def write(verdict: Verdict) -> Path:
    """Write a verdict whole or not at all, and return its path.

    Raises:
        CacheError: If it cannot be written.
    """
    folder = make_directory()
    path = folder / f'{verdict.card.key}.json'
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp('.json', '.new-', folder)
        with open(handle, 'w', encoding='utf-8') as file:
            json.dump(to_json(verdict), file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CacheError(f'{path} cannot be written: {error}') from error
    return path


def make_directory() -> Path:
    """Make the directory where it is missing, and return it.

    Raises:
        CacheError: If that is not possible, or others can write there.
    """
    folder = directory()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_owner(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError('no permission to write')
    except OSError as error:
        raise CacheError(
            f'verdicts of the self-check cannot be kept in {folder} '
            f'({error}); XDG_CACHE_HOME names another place'
        ) from error
    return folder


def check_owner(path: Path, found: Optional[os.stat_result] = None) -> None:
    """Raise an error if others than this user can write a file.

    Args:
        path (Path): A file or a directory; a link is neither.
        found (os.stat_result, optional): Of the open file. Defaults to that
            of the path.

    Raises:
        CacheError: If others can.
        OSError: If there is no such file.
    """
    if not hasattr(os, 'geteuid'):  # Windows
        return
    found = found or os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    problem = ''
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        problem = 'is a link or no plain file: remove it'
    elif found.st_uid != os.geteuid():
        problem = f'belongs to another user (id {found.st_uid}): remove it'
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f'can be written by others: chmod go-w {path}'
    if problem:
        raise CacheError(
            f'verdicts of the self-check are not trusted: {path} {problem}, '
            'or name another place by XDG_CACHE_HOME'
        )


@contextlib.contextmanager
def lock(card: Card, timeout: float) -> Iterator[None]:
    """Hold the lock of a card, so that one process checks it.

    The system releases it however the process ends.

    Args:
        card (Card): The card.
        timeout (float): Seconds to wait for another process.

    Raises:
        SelfCheckError: If another process holds it for longer.
        CacheError: If it cannot be locked.
    """
    path = make_directory() / f'{card.key}.lock'
    if fcntl is None:
        yield
        return
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
    until = time.monotonic() + timeout
    try:
        handle = os.open(path, flags, 0o600)
    except OSError as error:
        raise CacheError(f'{path} cannot be opened: {error}') from error
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise SelfCheckError(
                        'another process has been checking the kernels for '
                        f'more than {timeout:.0f} s'
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise CacheError(
                    f'{path} cannot be locked ({error}); XDG_CACHE_HOME '
                    'names another place'
                ) from error
        yield
    finally:
        os.close(handle)
