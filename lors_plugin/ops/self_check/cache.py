"""Keep verdicts in the user's cache directory.

Whoever can write there could make ``'auto'`` take wrong kernels, so directory
and files have to belong to the user, and others must not be able to write.
They hold JSON.
"""

import contextlib
import json
import os
import stat
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
        # Nobody else can change either from here on.
        check_owner(path.parent)
        check_owner(path)
        verdict = from_json(json.loads(path.read_text(encoding='utf-8')))
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
    path = make_directory() / f'{verdict.card.key}.json'
    new = path.with_name(f'.new-{os.getpid()}')
    try:
        with open(new, 'w', encoding='utf-8', opener=_private) as file:
            json.dump(to_json(verdict), file, indent=1)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
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


def check_owner(path: Path) -> None:
    """Raise an error if others than this user can write a file.

    Args:
        path (Path): A file or a directory; a link is neither.

    Raises:
        CacheError: If others can.
        OSError: If there is no such file.
    """
    found = os.lstat(path)
    if not hasattr(os, 'geteuid'):  # Windows
        return
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
    until = time.monotonic() + timeout
    try:
        file = open(path, 'a', opener=_private)  # noqa: SIM115
    except OSError as error:
        raise CacheError(f'{path} cannot be opened: {error}') from error
    with file:
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError as error:
                raise CacheError(
                    f'{path} cannot be locked ({error}); XDG_CACHE_HOME '
                    'names another place'
                ) from error
            if time.monotonic() > until:
                raise SelfCheckError(
                    'another process has been checking the kernels for more '
                    f'than {timeout:.0f} s'
                )
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
