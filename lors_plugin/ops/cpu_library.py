"""Build, check and load the package's C++ code for CPUs, ``csrc``.

It is built when the package is installed; in a checkout, also when it is first
needed and missing, damaged or older than its sources.
"""

import ctypes
import functools
import hashlib
import logging
import os
import re
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
TIMEOUT = 300  # seconds; five are normal
OFF = 'off'
# Behind the library in its file: hashes of the sources and of the library.
SEAL = 'lors_plugin sources {} library {}\n'
SEAL_PATTERN = re.compile(
    SEAL.format('([0-9a-f]{16})', '([0-9a-f]{64})').encode()
)
SEAL_SIZE = len(SEAL.format('0' * 16, '0' * 64))

logger = logging.getLogger('lors_plugin')


class CpuLibrary:
    """The compiled functions for one instruction set.

    Args:
        library (ctypes.CDLL): What ``csrc`` was compiled to.
        index (int): Of the instruction set, in the library's order.
    """

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.name = library.lors_set_name(index).decode()
        self.runs = bool(library.lors_set_runs(index))
        self._library, self._index = library, index

    def forward(self, call: ctypes.Structure) -> None:
        """Mix; ``call`` is a ``Mixing`` of ``csrc/mixing.h``."""
        self._library.lors_forward(self._index, ctypes.byref(call))

    def backward(self, call: ctypes.Structure) -> None:
        """Compute the gradients of :meth:`forward`."""
        self._library.lors_backward(self._index, ctypes.byref(call))

    def scratch_floats(self, call: ctypes.Structure) -> int:
        """Return the number of floats that each thread needs as scratch."""
        return self._library.lors_scratch_floats(ctypes.byref(call))


def load() -> Optional[CpuLibrary]:
    """Load the functions for the widest instruction set that runs here.

    The environment variable ``LORS_PLUGIN_CPU_KERNELS`` names another set, or
    says 'off'.

    Returns:
        CpuLibrary | None: None where there is none, which is logged once, and
        where it is off.

    Raises:
        RuntimeError: If what the variable asks for is not there.
    """
    wanted = os.environ.get(ENV_NAME, '').strip().lower()
    if wanted == OFF:
        return None
    found = find_sets()
    if isinstance(found, str):
        if wanted:
            raise RuntimeError(f'{ENV_NAME}={wanted!r}: {found}')
        _warn_once(found)
        return None
    running = [one for one in found if one.runs]
    for one in running:
        if wanted in ('', one.name.lower()):
            return one
    names = ', '.join(one.name for one in running)
    raise RuntimeError(
        f'{ENV_NAME}={wanted!r} is none of the instruction sets that run '
        f'here: {names} (or {OFF!r} for plain PyTorch)'
    )


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning('Plain PyTorch mixes on the CPU: %s', reason)


@functools.cache
def find_sets() -> Union[list[CpuLibrary], str]:
    """Return all instruction sets, the widest first, or why there are none."""
    path, sources = PACKAGE / FILE, PACKAGE / 'csrc'
    # Before it is loaded: a damaged file would end the process, and a file of
    # that name is never loaded again.
    built_from, problem = read_seal(path)
    if sources.is_dir() and built_from != (digest := hash_sources(sources)):
        problem = _build(sources, digest, path)
    if problem:
        return problem
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return f'{FILE} cannot be loaded: {error}'
    return [CpuLibrary(library, index) for index in range(library.lors_sets())]


def seal(path: Path, sources: str) -> None:
    """Append the hashes that :func:`read_seal` verifies.

    Args:
        path (Path): The library; it may have been sealed before.
        sources (str): What :func:`hash_sources` returned.
    """
    content = path.read_bytes()
    if SEAL_PATTERN.fullmatch(content[-SEAL_SIZE:]):
        content = content[:-SEAL_SIZE]
    digest = hashlib.sha256(content).hexdigest()
    path.write_bytes(content + SEAL.format(sources, digest).encode())


def read_seal(path: Path) -> tuple[str, str]:
    """Check that a library is whole, without loading it.

    Returns:
        tuple[str]: The hash of the sources that it was built from, '' unless
        it is whole; and what is wrong with it, '' if it is whole.
    """
    if not path.is_file():
        return '', (
            f'there is no {path.name}: when this package was installed, there '
            'was no C++ compiler with OpenMP'
        )
    content = path.read_bytes()
    match = SEAL_PATTERN.fullmatch(content[-SEAL_SIZE:])
    library = hashlib.sha256(content[:-SEAL_SIZE]).hexdigest()
    if match is None or match[2].decode() != library:
        return '', (
            f'{path} is damaged: its checksum is wrong; install this package '
            'again'
        )
    return match[1].decode(), ''


def _build(sources: Path, digest: str, target: Path) -> str:
    """Compile the sources; return why that failed, or ''."""
    compilers = [os.environ.get('CXX', ''), *COMPILERS]
    compiler = next(
        (c for c in map(shlex.split, compilers) if c and shutil.which(c[0])),
        None,
    )
    if compiler is None:
        return (
            f'{target.name} is missing, damaged or outdated, and there is no '
            'C++ compiler here'
        )
    logger.info('Compiling %s, once', target.name)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp('.so', '_build', target.parent)
        os.close(handle)
        subprocess.run(
            [
                *(*compiler, *FLAGS, '-shared', '-fPIC'),
                *(str(sources / 'mixing.cpp'), '-o', temporary),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        seal(Path(temporary), digest)
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
    """Return a hash of the C++ sources in a directory, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob('*.cpp'), *directory.glob('*.h')]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _declare(library: ctypes.CDLL) -> None:
    def declare(function: Callable, result, *arguments) -> None:
        function.restype, function.argtypes = result, list(arguments)

    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    declare(library.lors_sets, integer)
    declare(library.lors_set_name, ctypes.c_char_p, integer)
    declare(library.lors_set_runs, ctypes.c_int, integer)
    declare(library.lors_scratch_floats, integer, pointer)
    declare(library.lors_forward, None, integer, pointer)
    declare(library.lors_backward, None, integer, pointer)
