"""Reading and writing checkpoint files safely."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import torch

from lors_plugin.compat import register_safe_globals

from .convert import ConversionError


def load_checkpoint_file(path: Union[str, Path], trust: bool = False) -> dict:
    """Read a checkpoint to the CPU.

    Args:
        path (str | Path): The file.
        trust (bool): Allow a file to run code of its own while it is read,
            as files of old programs that hold more than tensors need.

    Returns:
        dict: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ConversionError: If it is no checkpoint, or needs ``trust``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {path} does not exist')
    register_safe_globals()
    try:
        content = torch.load(path, 'cpu', weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f'{path} holds more than tensors and plain values, or is damaged '
            f'({str(error).splitlines()[0]}). If you trust where it comes '
            'from, read it with --trust: it may then run code of its own'
        ) from error
    except (ImportError, AttributeError) as error:
        raise ConversionError(
            f'{path} needs a program that is not installed: {error}'
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ConversionError(
            f'{path} cannot be read; it is cut off or no checkpoint '
            f'({type(error).__name__}: {error})'
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(
            f'{path} holds a {type(content).__name__}, not a dictionary'
        )
    return content


@contextlib.contextmanager
def replace_file(path: Union[str, Path]) -> Iterator[Path]:
    """Give a path to write to; what is there then takes the place of a file.

    It lies beside the file, is flushed to disk and renamed, and the directory
    is flushed too. Whenever the process or the machine stops, the file is
    what it was before or what it was to become.

    Args:
        path (str | Path): The file; missing directories are made.

    Yields:
        Path: What to write.

    Raises:
        OSError: If it cannot be written; the file is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
        # Some network file systems cannot flush directories.
        with contextlib.suppress(OSError):
            _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def remove_interrupted_writes(directory: Union[str, Path]) -> None:
    """Remove what killed processes left of :func:`replace_file`.

    Args:
        directory (str | Path): Files of processes that still run on this
            machine are left alone.
    """
    for path in Path(directory).glob('.*.tmp'):
        match = re.fullmatch(r'\..+\.(\d+)\.tmp', path.name)
        if match and path.is_file() and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def save_checkpoint_file(content: dict, path: Union[str, Path]) -> None:
    """Write a checkpoint so that a crash or a full disk cannot damage it.

    Raises:
        OSError: If it cannot be written; ``path`` is as it was before.
    """
    try:
        with replace_file(path) as beside:
            torch.save(content, beside)
    except RuntimeError as error:
        # What torch makes of a full disk.
        raise OSError(f'{path} cannot be written: {error}') from error


def _flush(path: Path) -> None:
    """Flush a file or a directory to disk."""
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it belongs to another user
    return True


def weights_of(content: dict, ema: bool = True) -> dict:
    """The state dict in a checkpoint, without wrappers' prefixes.

    MMEngine writes averaged weights as the ``state_dict``, so that they are
    what everybody loads, and the plain ones as ``ema_state_dict``.

    Args:
        content (dict): A whole checkpoint or a bare state dict.
        ema (bool): Prefer averaged weights where there are any; old
            programs have them as ``ema_*`` buffers.

    Returns:
        dict[str, Tensor]: Keys as the bare model names them.
    """
    state = content.get('state_dict', content.get('model', content))
    if not ema:
        state = content.get('ema_state_dict') or state
    state = {
        key.removeprefix('module.'): value
        for key, value in state.items()
        if key != 'steps'
    }
    return _without_ema_buffers(state, ema)


def _without_ema_buffers(state: dict, ema: bool) -> dict:
    """Old programs register a buffer ``ema_a_b`` for a weight ``a.b``."""
    plain = {k: v for k, v in state.items() if not k.startswith('ema_')}
    buffers = {'ema_' + k.replace('.', '_'): k for k in plain}
    for key in state.keys() - plain.keys():
        if key not in buffers:
            plain[key] = state[key]
        elif ema:
            plain[buffers[key]] = state[key]
    return plain
