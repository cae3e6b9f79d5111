"""The package's compiled code for CPUs, ``csrc``, if it was built."""

import ctypes
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Optional, Union

ENV_NAME = 'LORS_PLUGIN_CPU_KERNELS'
PACKAGE = Path(__file__).resolve().parents[1]
FILE = '_cpu.so'
OFF = 'off'
MISSING = (
    f'there is no {FILE}: when this package was installed, there was no C++ '
    'compiler with OpenMP'
)

logger = logging.getLogger('lors_plugin')


class CompiledLibrary:
    """Compiled code with one set of instructions.

    Args:
        library (ctypes.CDLL): What ``csrc`` was compiled to.
        number (int): Of the set, in the library's order.
    """

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self.name = library.lors_set_name(number).decode()
        self.runs = bool(library.lors_set_runs(number))
        self._library, self._number = library, number

    def forward(self, call: ctypes.Structure) -> None:
        """Mix the queries of one group."""
        self._library.lors_forward(self._number, ctypes.byref(call))

    def backward(self, call: ctypes.Structure) -> None:
        """Gradients of the same."""
        self._library.lors_backward(self._number, ctypes.byref(call))

    def scratch_floats(self, call: ctypes.Structure) -> int:
        """Numbers of memory that each thread needs."""
        return self._library.lors_scratch_floats(ctypes.byref(call))


def load() -> Optional[CompiledLibrary]:
    """The widest set of instructions that runs here, or the one asked for.

    The environment variable ``LORS_PLUGIN_CPU_KERNELS`` names one of them, or
    says 'off'.

    Returns:
        CompiledLibrary | None: None without compiled code, and if it is off.

    Raises:
        RuntimeError: If what the variable asks for is not there.
    """
    return _choose(os.environ.get(ENV_NAME, '').strip().lower())


@functools.lru_cache(maxsize=8)
def _choose(wanted: str) -> Optional[CompiledLibrary]:
    if wanted == OFF:
        return None
    found = find_sets()
    if isinstance(found, str):
        if wanted:
            raise RuntimeError(f'{ENV_NAME}={wanted!r}: {found}')
        logger.warning('Plain PyTorch mixes on the CPU: %s', found)
        return None
    running = [one for one in found if one.runs]
    for one in running:
        if wanted in ('', one.name.lower()):
            return one
    names = ', '.join(one.name for one in running)
    raise RuntimeError(
        f'{ENV_NAME}={wanted!r} is none of the sets of instructions that run '
        f'here: {names} (or {OFF!r} for plain PyTorch)'
    )


@functools.lru_cache(maxsize=1)
def find_sets() -> Union[list[CompiledLibrary], str]:
    """All sets of instructions, the widest first; or why there are none."""
    path = PACKAGE / FILE
    if not path.is_file():
        return MISSING
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
        built_from = library.lors_sources().decode()
    except (OSError, AttributeError) as error:
        return f'{FILE} cannot be loaded: {error}'
    sources = PACKAGE / 'csrc'
    if sources.is_dir() and built_from != hash_sources(sources):
        return f'{FILE} was built from other sources than csrc'
    return [
        CompiledLibrary(library, number)
        for number in range(library.lors_sets())
    ]


def hash_sources(directory: Path) -> str:
    """What says which sources compiled code was built from."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob('*.cpp'), *directory.glob('*.h')]):
        digest.update(path.name.encode() + path.read_bytes())
    return 'h' + digest.hexdigest()[:16]


def _declare(library: ctypes.CDLL) -> None:
    def declare(function: Callable, result, *arguments) -> None:
        function.restype, function.argtypes = result, list(arguments)

    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    declare(library.lors_sources, ctypes.c_char_p)
    declare(library.lors_sets, integer)
    declare(library.lors_set_name, ctypes.c_char_p, integer)
    declare(library.lors_set_runs, ctypes.c_int, integer)
    declare(library.lors_scratch_floats, integer, pointer)
    declare(library.lors_forward, None, integer, pointer)
    declare(library.lors_backward, None, integer, pointer)
