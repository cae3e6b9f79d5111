"""Are there adapters that no output of a backbone depends on?"""

import copy
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .inject import adapters_of


def unreached_adapters(host: nn.Module) -> Optional[list[str]]:
    """Run a backbone forward and backward without values (meta device).

    Takes neither memory nor noticeable time and leaves the backbone as it is.

    Args:
        host (nn.Module): An adapted backbone for images.

    Returns:
        list[str], optional: Layers whose adapters get no gradient from any
        output; None if the backbone cannot run like that.
    """
    tensors = [*host.parameters(), *host.buffers()]
    if not tensors:
        return None
    # Instead of copies of the weights, which may be large.
    memo = {id(tensor): _without_values(tensor) for tensor in tensors}
    size = getattr(host, 'img_size', 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        twin = copy.deepcopy(host, memo)
        images = tensors[0].new_zeros(2, 3, height, width, device='meta')
        with torch.enable_grad():
            outputs = [out.sum() for out in _tensors(twin(images))]
            sum(out for out in outputs if out.requires_grad).backward()
    except Exception:  # whatever it is that this backbone cannot do so
        return None
    return [
        name
        for name, adapter in adapters_of(twin).items()
        if adapter.up_bias.requires_grad and adapter.up_bias.grad is None
    ]


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device='meta')
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        yield from _tensors(list(outputs.values()))
    elif isinstance(outputs, (list, tuple)):
        for part in outputs:
            yield from _tensors(part)
