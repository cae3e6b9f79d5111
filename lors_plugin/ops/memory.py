"""How the C library hands out memory."""

import functools

import torch

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
