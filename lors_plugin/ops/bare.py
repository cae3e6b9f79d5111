"""Whether tensors are numbers in memory, and nobody follows what is computed.

Code that PyTorch does not see may compute then, and only then.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def are_bare(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether tensors on a CPU have no meaning but their numbers.

    Not under a compiler or tracer, nor where someone looks at the operators,
    to count or to transform them; not for what stands for numbers that are
    not there, such as fake tensors and zeros without memory.

    Args:
        tensors (Iterable[Tensor]): All that are read.
        dtypes (Iterable[torch.dtype]): The types that will do.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        # Tangents would get lost.
        or forward_ad._current_level >= 0
    ):
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == 'cpu'
        and t.dtype in dtypes
        and not t.is_neg()
        and not t._is_zerotensor()
        and not _is_wrapped(t)
        for t in tensors
    )
