"""Read and write checkpoint files: the only reader and the only writer.

Every tool reads weights by :func:`load_checkpoint_file`, the hosts too once
:func:`lors_plugin.compat.read_safely` was called. Nothing in a file runs
while it is read unless the caller trusts it, and no text in it, such as the
config of its training, is ever executed.
"""

import contextlib
import json
import logging
import os
import pickle
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch
from mmengine.logging import print_log
from torch import Tensor

from lors_plugin.compat import register_safe_globals

from .convert import ConversionError

SAFETENSORS = '.safetensors'
_META = 'meta'
_FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
_FORCE_NOT = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
# Elements of a buffer that may repeat one value, such as a mask.
_EXPANDED = 2**24
# The policy is one for all threads: only one may change it at a time.
_POLICY = threading.RLock()


class MissingCheckpointError(ConversionError, FileNotFoundError):
    """There is no checkpoint of that name."""


def load_checkpoint_file(
    path: Union[str, Path],
    trust: bool = False,
    map_location: Any = 'cpu',
) -> dict:
    """Read a checkpoint, by default to the CPU.

    Args:
        path (str | Path): A file of PyTorch's format, a ``.safetensors``
            file, or an address that MMEngine loads from.
        trust (bool): Allow a file to run code of its own while it is read,
            as files of old programs that hold more than tensors need.
            Defaults to False.
        map_location (Any): As for :func:`torch.load`. Defaults to 'cpu'.

    Returns:
        dict: What the file holds. Of a ``.safetensors`` file that is
        ``state_dict`` and ``meta``.

    Raises:
        MissingCheckpointError: If there is no such file; a
            ``FileNotFoundError`` and a :class:`ConversionError`.
        ConversionError: If it is no checkpoint, or needs ``trust``. The
            message is one line with the path in it.
    """
    address = '://' in str(path)
    if not address:
        check_is_file(path)
    try:
        if address:
            content = _read_address(str(path), trust)
        elif Path(path).suffix == SAFETENSORS:
            content = _read_safetensors(path, map_location)
        else:
            content = _read_torch(path, trust, map_location)
    except ConversionError:
        raise
    except Exception as error:
        # Unpickling a damaged file may raise anything.
        raise ConversionError(_why_unreadable(path, error, trust)) from error
    return check_content(content, path)


def check_is_file(
    path: Union[str, Path], what: str = 'the checkpoint file'
) -> None:
    """Check that there is a file at a local path.

    Args:
        path (str | Path): The path.
        what (str): What the message calls it. Defaults to 'the checkpoint
            file'.

    Raises:
        MissingCheckpointError: If there is none, or something else, such as
            a directory or a named pipe, which would be waited for.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = f'does not exist (current directory: {Path.cwd()})'
    except OSError as error:
        problem = f'cannot be read: {error.strerror}'
    else:
        if stat.S_ISREG(mode):
            return
        problem = 'is no file'
        if stat.S_ISDIR(mode):
            problem = _about_directory(Path(path))
    raise MissingCheckpointError(f'{what} {path} {problem}')


def _about_directory(path: Path) -> str:
    """Say what a directory is that is not the file it should be."""
    if (path / 'rank0.pth').is_file():
        return (
            'is a directory of shards of FSDP, which nothing here puts '
            "together; train with strategy.state_dict_cfg='full'"
        )
    if any(path.glob('*mp_rank_00_model_states.pt')):
        folder, whole = path.parent, path.parent / 'whole'
        return (
            'is a directory of DeepSpeed; make a file of it by `python -m '
            f'deepspeed.utils.zero_to_fp32 {folder} {whole} -t {path.name}` '
            f'and name {whole / "pytorch_model.bin"}'
        )
    return 'is a directory; name a file in it'


def read_weights(
    path: Union[str, Path], trust: bool = False, ema: bool = True
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, see :func:`load_checkpoint_file`.

    Args:
        path (str | Path): A file or an address.
        trust (bool): Allow it to run code of its own. Defaults to False.
        ema (bool): See :func:`weights_of`. Defaults to True.

    Returns:
        dict[str, Tensor]: See :func:`weights_of`.
    """
    return weights_of(load_checkpoint_file(path, trust), ema, path)


def state_of(content: dict) -> Any:
    """Return what MMEngine, many other programs and DeepSpeed call weights."""
    names = ('state_dict', 'model', 'module')
    # A whole pickled model is no dictionary of weights.
    found = (content.get(name) for name in names)
    return next((state for state in found if isinstance(state, dict)), content)


def weights_of(
    content: dict, ema: bool = True, path: Any = 'the checkpoint'
) -> dict[str, Tensor]:
    """Take the state dict out of a checkpoint, without wrappers' prefixes.

    MMEngine writes averaged weights as the ``state_dict``, so that every
    program loads them, and the plain ones as ``ema_state_dict``.

    Args:
        content (dict): A whole checkpoint or a state dict.
        ema (bool): Prefer averaged weights where there are any; old
            programs have them as ``ema_*`` buffers. Defaults to True.
        path (Any): Where it comes from, for messages.

    Returns:
        dict[str, Tensor]: Keys as the unwrapped model names them.

    Raises:
        ConversionError: If there are no weights, or keys are no names.
    """
    state = state_of(content)
    if not ema:
        state = content.get('ema_state_dict') or state
    weights: dict[str, Tensor] = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        if not isinstance(value, Tensor) or key == 'steps':
            continue
        if not isinstance(key, str):
            raise ConversionError(
                f'{path}: a key of its weights is {key!r}, not a name'
            )
        name = unwrapped_key(key)
        if name in weights:
            raise ConversionError(
                f'{path}: it has {name} twice, with and without the prefix '
                'of a wrapper'
            )
        weights[name] = value
    if not weights:
        raise ConversionError(f'{path} holds no weights (no `state_dict`)')
    return _without_ema_buffers(weights, ema)


def unwrapped_key(key: str) -> str:
    """Remove what wrappers add to the name of a weight.

    ``torch.compile`` adds ``_orig_mod.`` where the compiled module is,
    parallel wrappers ``module.`` in front.
    """
    return re.sub(r'(^|\.)_orig_mod\.', r'\1', key).removeprefix('module.')


def check_content(content: Any, path: Any) -> dict:
    """Check that what was read has the form of a checkpoint.

    Args:
        content (Any): What was read.
        path (Any): Where it comes from, for messages.

    Returns:
        dict: The content.

    Raises:
        ConversionError: If it, its ``state_dict`` or its ``meta`` is no
            dictionary, or if a weight holds NaN or has no plain values.
    """
    if not isinstance(content, dict):
        raise ConversionError(
            f'{path} holds a {type(content).__name__}, not a dictionary'
        )
    kinds = dict(state_dict=dict, meta=(dict, type(None)))
    for name in kinds if 'state_dict' in content else ():
        value = content.get(name)
        if not isinstance(value, kinds[name]):
            raise ConversionError(
                f'{path}: its {name} is a {type(value).__name__}, not a '
                'dictionary'
            )
    state = state_of(content)
    for weights in (state, content.get('ema_state_dict')):
        if isinstance(weights, dict):
            _check_values(weights, path)
    return content


def _check_values(weights: dict, path: Any) -> None:
    """Refuse weights that no model computes anything with.

    Infinities are only told: masks hold them.
    """
    odd, nan, infinite = [], [], []
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            continue
        if value.is_meta or value.layout != torch.strided:
            odd.append(f'{key} ({value.layout} on {value.device})')
        elif value.is_quantized:
            odd.append(f'{key} ({value.dtype})')
        elif _claims_more(value):
            odd.append(f'{key} {tuple(value.shape)} of fewer values')
        elif value.is_floating_point() or value.is_complex():
            # There is no test for types of one byte.
            value = value.float() if value.element_size() == 1 else value
            if not value.isfinite().all():
                (nan if value.isnan().any() else infinite).append(str(key))
    if odd:
        raise ConversionError(
            f'{path}: {len(odd)} of {len(weights)} weights have no plain '
            f'values, so a model would keep its own: {", ".join(odd[:4])}'
        )
    if nan:
        raise ConversionError(
            f'{path}: {len(nan)} of {len(weights)} weights hold NaN, since '
            f'the training diverged or the file is damaged: '
            f'{", ".join(nan[:4])}'
        )
    if infinite:
        print_log(
            f'{path}: {len(infinite)} of {len(weights)} weights hold inf: '
            f'{", ".join(infinite[:4])}',
            logger='current',
            level=logging.WARNING,
        )


def _claims_more(value: Tensor) -> bool:
    """Return whether a tensor has more elements than its memory.

    Strides of 0 make terabytes of a single value; whoever computes with them
    needs the memory.
    """
    held = value.untyped_storage().nbytes() // value.element_size()
    return value.numel() > max(held, _EXPANDED)


def set_torch_policy(trust: bool) -> None:
    """Tell each later ``torch.load`` whether files may run code.

    By environment variables that PyTorch knows from 2.4 on (the one for
    ``trust`` from 2.6 on, where it became necessary); processes that are
    started inherit them.

    Args:
        trust (bool): Whether files may run code of their own.
    """
    wanted, other = (_FORCE_NOT, _FORCE) if trust else (_FORCE, _FORCE_NOT)
    os.environ.pop(other, None)
    os.environ[wanted] = '1'


@contextlib.contextmanager
def torch_policy(trust: bool) -> Iterator[None]:
    """Apply :func:`set_torch_policy` to a block, in one thread at a time."""
    with _POLICY:
        before = {name: os.environ.get(name) for name in (_FORCE, _FORCE_NOT)}
        set_torch_policy(trust)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


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
    write_all({Path(path): checkpoint_writer(path, content)})


def _flush(path: Path) -> None:
    """Flush a file or a directory to disk."""
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    """Return whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it belongs to another user
    return True


def checkpoint_writer(path: Union[str, Path], content: dict) -> Callable:
    """Make the function that writes a checkpoint in the format of its name.

    Args:
        path (str | Path): Where it will be in the end.
        content (dict): For ``.safetensors`` with ``state_dict`` and
            ``meta``, of which that format keeps what JSON can hold.

    Returns:
        Callable: It takes the path to write to.
    """
    if Path(path).suffix != SAFETENSORS:
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
    """Write several files, all of them or none; see :func:`replace_file`.

    Args:
        writers (dict[Path, Callable]): Functions that write to a path, by
            the file to write.

    Raises:
        OSError: If one cannot be written; all are as they were before.
    """
    with contextlib.ExitStack() as stack:
        for path, write in writers.items():
            beside = stack.enter_context(replace_file(path))
            try:
                write(beside)
            except OSError:
                raise
            except Exception as error:
                # What torch and safetensors make of a full disk.
                raise OSError(f'{path} cannot be written: {error}') from error


def _read_torch(path: Union[str, Path], trust: bool, map_location: Any) -> Any:
    _check_sums(path)
    register_safe_globals()
    if trust:
        with torch_policy(trust):
            return torch.load(path, map_location, weights_only=False)
    _refuse_old_formats(path)
    return torch.load(path, map_location, weights_only=True)


def _check_sums(path: Union[str, Path]) -> None:
    """Compare the checksums of an archive, which PyTorch does not.

    PyTorch reads compressed archives too, but writes none. A small one may
    hold more than any memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        unpacked = sum(part.file_size for part in file.infolist())
        packed = os.path.getsize(path)
        if unpacked > packed:
            raise ConversionError(
                f'{path} has {packed} bytes and would unpack to {unpacked}: '
                'it is no checkpoint of PyTorch, or compressed; unpack it by '
                'other means if you trust where it comes from'
            )
        damaged = file.testzip()
    if damaged is not None:
        raise ConversionError(
            f'{path} is damaged (wrong checksum of {damaged})'
        )


def _refuse_old_formats(path: Union[str, Path]) -> None:
    """Refuse what PyTorch before 2.6 reads unsafely in spite of all.

    It executes TorchScript, and unpacks tar files anywhere.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
        if any(name.endswith('/constants.pkl') for name in names):
            raise pickle.UnpicklingError('it is TorchScript')
        return
    try:
        tarfile.open(path, 'r:').close()
    except tarfile.TarError:
        return
    raise pickle.UnpicklingError('it is a tar file')


def _read_address(address: str, trust: bool) -> Any:
    """Read by MMEngine what an address names."""
    from mmengine.runner import CheckpointLoader

    register_safe_globals()
    with torch_policy(trust):
        return CheckpointLoader.load_checkpoint(
            address, map_location='cpu', logger='silent'
        )


def _read_safetensors(path: Union[str, Path], map_location: Any) -> dict:
    safetensors = _safetensors()
    device = map_location if isinstance(map_location, str) else 'cpu'
    with safetensors.safe_open(path, 'pt', device) as file:
        names = list(file.keys())
        state = {name: file.get_tensor(name) for name in names}
        meta = json.loads((file.metadata() or {}).get(_META, '{}'))
    return dict(meta=meta, state_dict=state)


def _why_unreadable(
    path: Union[str, Path], error: Exception, trust: bool
) -> str:
    """Explain in one line why a file cannot be read."""
    lines = [line.strip() for line in str(error).splitlines()]
    # PyTorch says which class it refuses below advice for its callers.
    named = [line for line in lines if re.search('GLOBAL|nsupported', line)]
    reason = (named or list(filter(None, lines)) or ['it ends too early'])[0]
    reason = reason.partition('. ')[0].rstrip('.')
    if isinstance(error, pickle.UnpicklingError) and not trust:
        return (
            f'{path} holds more than tensors and plain values, or is damaged '
            f'({reason}); nothing was loaded. If you trust where it comes '
            'from, read it with --trust: it may then run code of its own'
        )
    if isinstance(error, (ImportError, AttributeError)):
        return f'{path} needs a program that is not installed: {reason}'
    return (
        f'{path} cannot be read; it is cut off or no checkpoint '
        f'({type(error).__name__}: {reason})'
    )


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


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ConversionError(
            f'{SAFETENSORS} needs safetensors; pip install safetensors'
        ) from error
    return safetensors


def _plain(value: Any) -> Optional[Any]:
    """Keep what JSON can hold of a value; the rest is left out."""
    if isinstance(value, dict):
        pairs = ((str(k), _plain(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)):
        return value
    return None
