"""Reading and writing checkpoint files safely."""

import os
import pickle
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


def save_checkpoint_file(content: dict, path: Union[str, Path]) -> None:
    """Write a checkpoint beside its place, then rename.

    A crash or a full disk leaves what was there before.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    except RuntimeError as error:
        # What torch makes of a full disk.
        raise OSError(f'{path} cannot be written: {error}') from error
    finally:
        beside.unlink(missing_ok=True)


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
