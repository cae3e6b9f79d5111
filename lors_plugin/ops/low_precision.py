"""When products under autocast are made by hand, on CPUs.

Autocast alone casts a shared weight once, but each call makes a gradient of
its size in half precision and adds it up in half precision.
"""

from typing import Optional

import torch
from torch import Tensor

# Columns whose half-precision product stays in the cache until it is added
# to a float32 total.
CHUNK = 2048


def in_low_precision(weight: Tensor, *others: Optional[Tensor]) -> bool:
    """Whether calls under autocast take a weight that was cast by hand.

    Args:
        weight (Tensor): A float32 weight, on a CPU, outside the compiler.
        others (Tensor, optional): Other inputs; autocast leaves float64
            alone.
    """
    kind = weight.device.type
    return (
        kind == 'cpu'
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled(kind)
        and not torch.compiler.is_compiling()
        and all(t is None or t.dtype != torch.float64 for t in others)
    )
