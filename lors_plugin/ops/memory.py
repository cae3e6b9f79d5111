"""How the system hands out memory, on CPUs."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

# The largest block that glibc keeps when it is given back: a little less than
# 32 MB, above which it asks the system each time.
KEPT_BYTES = 2**25 - 2**12


@functools.lru_cache(maxsize=1)
def keep_memory() -> None:
    """Let the C library keep large blocks that were given back.

    glibc returns memory above 128 kB to the system until it has seen a larger
    block come back, and each page fetched anew costs more than the arithmetic
    on it. One block of the largest size is enough, and costs nothing since
    nobody writes to it. Other libraries take no notice.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


def new_large(
    like: Tensor, shape: Sequence[int], dtype: Optional[torch.dtype] = None
) -> Tensor:
    """``like.new_empty(shape)``, in large pages where that pays.

    Blocks that glibc does not keep are fetched anew each time. In pages of
    2 MB rather than 4 kB, that takes a third to three quarters of the time.
    Linux is asked for them, and gives them where its administrator lets it.
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


@functools.lru_cache(maxsize=1)
def _advise() -> Optional[Callable]:
    """madvise(2) of the C library; None where there are no large pages."""
    if sys.platform != 'linux' or not hasattr(mmap, 'MADV_HUGEPAGE'):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    function.restype = ctypes.c_int
    return function
