"""Files of merged weights: all of them written, or none."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lors_plugin.checkpoints import ConversionError, load_checkpoint_file

SUFFIX = '.safetensors'
_META = 'meta'


def read_file(path: Union[str, Path], trust: bool = False) -> dict:
    """Read a checkpoint, also one in ``.safetensors``.

    Args:
        path (str | Path): The file.
        trust (bool): See :func:`load_checkpoint_file`; the other kind holds
            nothing that could run.

    Returns:
        dict: With ``state_dict`` and ``meta`` if it was written here.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        return load_checkpoint_file(path, trust)
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {path} does not exist')
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, 'pt') as file:
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
            meta = json.loads((file.metadata() or {}).get(_META, '{}'))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConversionError(f'{path} cannot be read: {error}') from error
    return dict(meta=meta, state_dict=state)


def checkpoint_writer(path: Union[str, Path], content: dict) -> Callable:
    """What writes a checkpoint, in the format that its name says.

    Args:
        path (str | Path): Where it will be in the end.
        content (dict): With ``state_dict`` and ``meta``. Of the latter,
            ``.safetensors`` keeps what JSON can hold.

    Returns:
        Callable: It takes the path to write to.
    """
    if Path(path).suffix != SUFFIX:
        return lambda target: torch.save(content, target)
    safetensors = _safetensors()
    # No two of its tensors may share memory.
    state = {
        key: value.detach().clone().contiguous()
        for key, value in content['state_dict'].items()
        if isinstance(value, Tensor)
    }
    metadata = {'format': 'pt', _META: json.dumps(_plain(content['meta']))}
    return lambda target: safetensors.torch.save_file(state, target, metadata)


def write_all(writers: dict[Path, Callable]) -> None:
    """Write files beside their places, then rename all.

    Args:
        writers (dict[Path, Callable]): What writes a file, by its place.

    Raises:
        OSError: If one cannot be written. All are as they were then.
    """
    beside = {
        path: path.with_name(f'.{path.name}.{os.getpid()}.tmp')
        for path in writers
    }
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside[path])
        for path, new in beside.items():
            os.replace(new, path)
    except OSError:
        raise
    except Exception as error:
        # What torch and safetensors make of a full disk.
        raise OSError(f'{path} cannot be written: {error}') from error
    finally:
        for new in beside.values():
            new.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ConversionError(
            f'{SUFFIX} needs safetensors; pip install safetensors'
        ) from error
    return safetensors


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; the rest is left out."""
    if isinstance(value, dict):
        pairs = ((str(k), _plain(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)):
        return value
    return None
