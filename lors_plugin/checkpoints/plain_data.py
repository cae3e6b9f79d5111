"""Read pickles and YAML files of plain data; nothing in them runs.

Predictions of ``tools/test.py --out`` are pickles, and data sets may have
annotations or proposals in both.
"""

import codecs
import collections
import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
import torch
import yaml
from mmengine.fileio import PickleHandler, YamlHandler

from .convert import ConversionError
from .files import check_is_file

# In C it takes a tenth of the time, and hosts' metafiles are many.
_YAML_LOADER = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)


def load_pickle_file(path: Union[str, Path], trust: bool = False) -> Any:
    """Read a pickle.

    Args:
        path (str | Path): The file.
        trust (bool): Allow it to hold more than plain values, which may run
            code of its own. Defaults to False.

    Returns:
        Any: What it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ConversionError: If it is damaged, or needs ``trust``. The message is
            one line with the path in it.
    """
    check_is_file(path, 'the pickle')
    with Path(path).open('rb') as file:
        try:
            return pickle.load(file) if trust else load_plain_pickle(file)
        except pickle.UnpicklingError as error:
            hint = 'is it a pickle?'
            if not trust:
                hint = (
                    'if you trust where it comes from, read it with --trust: '
                    'it may then run code of its own'
                )
            raise ConversionError(
                f'{path} cannot be read ({error}); {hint}'
            ) from error
        except Exception as error:
            # Unpickling a damaged file may raise anything.
            reason = ' '.join(str(error).split())
            raise ConversionError(
                f'{path} cannot be read; it is cut off or no pickle '
                f'({type(error).__name__}: {reason})'
            ) from error


def load_plain_pickle(file: BinaryIO) -> Any:
    """Unpickle plain values, tensors and arrays, and nothing else.

    Args:
        file (BinaryIO): Open for reading.

    Raises:
        pickle.UnpicklingError: If it names anything else.
    """
    return _PlainUnpickler(file).load()


class PlainPickleHandler(PickleHandler):
    """Read pickles for ``mmengine.load``."""

    def load_from_fileobj(self, file: BinaryIO, **kwargs: Any) -> Any:
        """Read plain values, see :func:`load_plain_pickle`."""
        try:
            return load_plain_pickle(file)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f'a pickle of the data cannot be read ({error}); if you '
                'trust where it comes from, add --trust: it may then run '
                'code of its own'
            ) from error


class PlainYamlHandler(YamlHandler):
    """Read YAML files for ``mmengine.load``."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Read plain values."""
        try:
            return yaml.load(file, _YAML_LOADER)
        except yaml.constructor.ConstructorError as error:
            raise ConversionError(
                f'a YAML file of the data cannot be read ({error.problem}); '
                'if you trust where it comes from, add --trust: it may then '
                'run code of its own'
            ) from error


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows a few harmless classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f'it holds more than plain values: {module}.{name}'
            ) from None


def _storage(data: bytes) -> Any:
    """``torch.storage._load_from_bytes``, which would run code by itself."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _known() -> dict[tuple[str, str], Any]:
    core = getattr(np, '_core', None) or np.core
    rebuild = torch._utils._rebuild_tensor_v2
    known = {
        ('torch._utils', '_rebuild_tensor_v2'): rebuild,
        ('torch.storage', '_load_from_bytes'): _storage,
        ('torch', 'Size'): torch.Size,
        ('torch', 'device'): torch.device,
        ('collections', 'OrderedDict'): collections.OrderedDict,
        ('numpy', 'ndarray'): np.ndarray,
        ('numpy', 'dtype'): np.dtype,
        # Python 3 writes bytes by it in the older protocols.
        ('_codecs', 'encode'): codecs.encode,
    }
    for kind in (set, frozenset, slice, complex, bytearray, range):
        known['builtins', kind.__name__] = kind
        known['__builtin__', kind.__name__] = kind
    # NumPy 2 moved `numpy.core`; files hold the name of their writer's.
    for root in ('numpy.core', 'numpy._core'):
        known[f'{root}.multiarray', '_reconstruct'] = (
            core.multiarray._reconstruct
        )
        known[f'{root}.multiarray', 'scalar'] = core.multiarray.scalar
        known[f'{root}.numeric', '_frombuffer'] = core.numeric._frombuffer
    return known


_KNOWN = _known()
