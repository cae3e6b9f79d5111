"""Select the implementation of an operator, and hint the CPU's allocator.

The choice is made per call, from what is known about the tensor and the
machine and before anything is compiled: some versions of Triton abort the
whole process on some GPUs, which no ``except`` can catch. On a GPU, ``'auto'``
takes what the self-check (``self_check``) found right and faster there.
"""

import ctypes
import functools
import logging
import mmap
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import cpu_library

# What a config may ask of all operators. An operator with a C++
# implementation takes 'cpu' as well.
BACKENDS = ('auto', 'torch', 'triton', 'reference')
ENV_NAME = 'LORS_PLUGIN_BACKEND'
# The kernels of sampling do not compile with 3.2 and 3.3, and those of mixing
# spill registers with 3.4 and 3.5.
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (7, 0)
# Below it there are no tensor-core paths in Triton any more and no
# conversions of bfloat16; kernels compute in float32 there.
FULL_CAPABILITY = (8, 0)

# The largest block that glibc keeps when it is given back: a little less than
# 32 MB, above which it asks the system each time.
KEPT_BYTES = 2**25 - 2**12

logger = logging.getLogger('lors_plugin')
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def select_backend(
    requested: str,
    tensor: Tensor,
    refusal: str = '',
    cpu_refusal: Optional[str] = None,
    operator: str = 'mixing',
) -> str:
    """Choose the implementation for one call.

    Costs a few microseconds, asks the driver once per device, and may be
    called under ``torch.compile``, where the choice becomes part of the
    compiled program (a variable that is changed later has no effect).

    Args:
        requested (str): What the caller or the config asks for. ``'auto'``
            leaves the choice to the environment variable
            ``LORS_PLUGIN_BACKEND`` and, without it, to the package: Triton
            on a GPU where the self-check found it right and faster, C++ for
            float32 on a CPU where the operator has it, 'torch' otherwise.
        tensor (Tensor): An input as the implementation will get it, of any
            shape: its device and its type decide.
        refusal (str): Why the Triton kernels cannot take these sizes, '' if
            they can.
        cpu_refusal (str, optional): Why the C++ code cannot take these
            sizes, '' if it can. Defaults to None, for an operator without
            C++ code.
        operator (str): Name of the kernels in the self-check: 'mixing',
            'low_rank_mixing' or 'sampling'. Defaults to 'mixing'.

    Returns:
        str: ``'torch'`` (any device), ``'cpu'`` (C++), ``'triton'`` or
        ``'reference'`` (the readable definition of what is right).

    Raises:
        ValueError: If the request or the variable names no backend.
        RuntimeError: If 'triton' or 'cpu' is asked for and cannot run here.
    """
    return _choose(
        requested,
        tensor.device.type,
        tensor.device.index,
        tensor.dtype,
        refusal,
        cpu_refusal,
        operator,
    )


def _choose(
    requested: str,
    kind: str,
    index: Optional[int],
    dtype: torch.dtype,
    refusal: str,
    cpu_refusal: Optional[str] = None,
    operator: str = 'mixing',
) -> str:
    with_cpu = cpu_refusal is not None
    name, source = _requested(requested, with_cpu)
    if name in ('torch', 'reference'):
        return name
    if name == 'cpu' or (name == 'auto' and kind == 'cpu' and with_cpu):
        reason = cpu_refusal or _cpu_refusal(kind, dtype)
        if name == 'cpu' and reason:
            raise RuntimeError(_refused(source, name, reason))
        return 'torch' if reason else 'cpu'
    if name == 'auto' and kind != 'cuda':
        return 'torch'
    possible, reason = device_verdict(kind, index, dtype)
    if possible and refusal:
        possible, reason = False, refusal
    if name == 'triton':
        if not possible:
            raise RuntimeError(_refused(source, name, reason))
        return 'triton'
    if possible and _interpreting():
        possible, reason = False, 'TRITON_INTERPRET=1 runs kernels on the CPU'
    if possible:
        from . import self_check

        possible, reason = self_check.decide(operator, dtype, index)
    _log_once(possible, reason)
    return 'triton' if possible else 'torch'


# What `torch.compiler.assume_constant_result` does; calling that here would
# import the whole compiler with the operators.
_choose._dynamo_marked_constant = True


def _requested(requested: str, with_cpu: bool = False) -> tuple[str, str]:
    """Return the name that counts and the variable or argument it is from."""
    name, source = requested, 'backend'
    choices = (*BACKENDS, 'cpu') if with_cpu else BACKENDS
    if requested == 'auto':
        name, source = os.environ.get(ENV_NAME) or 'auto', ENV_NAME
        choices = BACKENDS
    if name not in choices:
        raise ValueError(
            f'{source}={name!r} is no backend; choose one of {choices}'
        )
    return name, source


def _refused(source: str, name: str, reason: str) -> str:
    return (
        f"{source}={name!r} cannot be honoured: {reason}; 'auto' takes what "
        'works'
    )


def _cpu_refusal(kind: str, dtype: torch.dtype) -> str:
    """Say why the C++ code cannot run, '' if it can."""
    if kind != 'cpu' or dtype != torch.float32:
        return (
            'the C++ code takes float32 on the CPU, and the tensor is '
            f'{dtype} on {kind}'
        )
    if cpu_library.load() is None:
        return 'there is no compiled C++ code, or it is switched off'
    return ''


def triton_verdict(
    kind: str,
    dtype: torch.dtype,
    version: Optional[tuple[int, ...]],
    capability: Optional[tuple[int, int]] = None,
    interpret: bool = False,
    rocm: bool = False,
) -> tuple[bool, str]:
    """Say whether the Triton kernels give right results there.

    A pure function, so that tests can ask for machines that are not there.

    Args:
        kind (str): Type of the device, 'cuda' or 'cpu' or another.
        dtype (torch.dtype): Type of the products.
        version (tuple[int], optional): Version of Triton, None without.
        capability (tuple[int], optional): Compute capability of the GPU,
            not needed under the interpreter. Defaults to None.
        interpret (bool): Whether Triton's interpreter is on.
        rocm (bool): Whether 'cuda' means an AMD GPU.

    Returns:
        tuple[bool, str]: Yes or no, and if no the reason.
    """
    if version is None:
        return False, 'Triton is not installed'
    if version[:2] < OLDEST_TRITON:
        return False, (
            f'Triton {_dotted(version)} is older than '
            f'{_dotted(OLDEST_TRITON)}, the oldest whose kernels compiled'
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, (
            'the kernels compute in float32, float16 and bfloat16, '
            f'not {dtype}'
        )
    if interpret:
        if dtype == torch.bfloat16:
            return False, 'the interpreter of Triton is wrong in bfloat16'
        return True, ''
    if kind != 'cuda':
        return False, (
            f'the tensor is on {kind}, and the kernels run on NVIDIA GPUs '
            '(TRITON_INTERPRET=1, set before Triton is imported, runs them '
            'on the CPU, slowly)'
        )
    if rocm:
        return False, 'the kernels are not known to be right on AMD GPUs'
    if capability is None or capability < OLDEST_CAPABILITY:
        return False, (
            f'the GPU has compute capability {_dotted(capability or ())}, '
            f'Triton needs {_dotted(OLDEST_CAPABILITY)}'
        )
    if dtype == torch.bfloat16 and capability < FULL_CAPABILITY:
        return False, (
            f'compute capability {_dotted(capability)} has no bfloat16; use '
            'float16'
        )
    return True, ''


@functools.cache
def device_verdict(
    kind: str, index: Optional[int], dtype: torch.dtype
) -> tuple[bool, str]:
    """Give :func:`triton_verdict` for a device of this machine.

    Args:
        kind (str): Type of the device.
        index (int, optional): Number of the device; None for the current.
        dtype (torch.dtype): Type of the products.
    """
    capability = None
    if kind == 'cuda' and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(index)
    return triton_verdict(
        kind,
        dtype,
        triton_version(),
        capability,
        _interpreting(),
        torch.version.hip is not None,
    )


@functools.cache
def triton_version() -> Optional[tuple[int, ...]]:
    """The version of Triton as numbers, None if it cannot be imported."""
    try:
        import triton
    except ImportError:
        return None
    match = re.match(r'\d+(\.\d+)*', triton.__version__)
    return tuple(map(int, match.group().split('.'))) if match else None


def tf32_allowed() -> bool:
    """Return whether PyTorch may multiply float32 matrices in TF32."""
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # it was set by its newer name
        return matmul.fp32_precision == 'tf32'


def _interpreting() -> bool:
    return os.environ.get('TRITON_INTERPRET', '') == '1'


@functools.cache
def _log_once(possible: bool, reason: str) -> None:
    if possible:
        logger.info('Triton kernels run: %s', reason)
    else:
        logger.warning('The PyTorch operators run, not Triton: %s', reason)


def _dotted(version: tuple[int, ...]) -> str:
    return '.'.join(map(str, version)) or 'unknown'


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors are plain: not traced, faked or transformed."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and all(
            type(t) in (Tensor, nn.Parameter) and not _is_wrapped(t)
            for t in tensors
        )
    )


@functools.cache
def keep_memory() -> None:
    """Let the C library keep large blocks that were given back.

    glibc returns memory above 128 kB to the system until it has seen a larger
    block come back, and each page fetched anew costs more than the arithmetic
    on it. One block of the largest size is enough, and costs nothing since it
    is never written to. Other libraries take no notice.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


def new_large(
    like: Tensor, shape: Sequence[int], dtype: Optional[torch.dtype] = None
) -> Tensor:
    """Return ``like.new_empty(shape)``, on Linux in transparent huge pages.

    Blocks that glibc does not keep are fetched anew each time. In pages of
    2 MB rather than 4 kB, that takes a third to three quarters of the time.
    """
    out = like.new_empty(shape, dtype=dtype)
    # A fake tensor has no memory.
    real = type(out) is Tensor and out.device.type == 'cpu'
    advise = _advise() if real and out.nbytes > KEPT_BYTES else None
    if advise is not None:
        page = mmap.PAGESIZE
        start = -(-out.data_ptr() // page) * page
        size = (out.data_ptr() + out.nbytes - start) // page * page
        advise(start, size, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _advise() -> Optional[Callable]:
    """Return madvise(2) of the C library, None without huge pages."""
    if sys.platform != 'linux' or not hasattr(mmap, 'MADV_HUGEPAGE'):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    function.restype = ctypes.c_int
    return function
