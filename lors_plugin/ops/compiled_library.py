"""The package's compiled code for CPUs, ``csrc``.

It is built when the package is installed; in a checkout, also when it is first
needed and missing or older than its sources.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Optional, Union

ENV_NAME = 'LORS_PLUGIN_CPU_KERNELS'
PACKAGE = Path(__file__).resolve().parents[1]
FILE = '_cpu.so'
FLAGS = ['-std=c++17', '-O3', '-g0', '-fopenmp']
COMPILERS = 'g++', 'c++', 'clang++'
SECONDS = 300  # five are normal
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
    path, sources = PACKAGE / FILE, PACKAGE / 'csrc'
    if sources.is_dir():
        digest = hash_sources(sources)
        # Without loading it: a file of that name is never loaded again.
        if not (path.is_file() and digest.encode() in path.read_bytes()):
            refusal = _build(sources, digest, path)
            if refusal:
                return refusal
    if not path.is_file():
        return MISSING
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return f'{FILE} cannot be loaded: {error}'
    return [
        CompiledLibrary(library, number)
        for number in range(library.lors_sets())
    ]


def _build(sources: Path, digest: str, target: Path) -> str:
    """Compile the sources; return why that failed, or ''."""
    compilers = [os.environ.get('CXX', ''), *COMPILERS]
    compiler = next(
        (c for c in map(shlex.split, compilers) if c and shutil.which(c[0])),
        None,
    )
    if compiler is None:
        return (
            f'{target.name} is missing or outdated, and no C++ compiler here'
        )
    logger.info('Compiling %s, once', target.name)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp('.so', '_build', target.parent)
        os.close(handle)
        subprocess.run(
            [
                *(*compiler, *FLAGS, '-shared', '-fPIC'),
                *(f'-DLORS_SOURCES={digest}', str(sources / 'mixing.cpp')),
                *('-o', temporary),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        os.chmod(temporary, 0o755)
        # In one step: other processes may be at it too.
        os.replace(temporary, target)
    except (OSError, subprocess.SubprocessError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        said = (getattr(error, 'stderr', None) or str(error)).strip()
        return f'{target.name} cannot be compiled: {said.splitlines()[0]}'
    return ''


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
