"""Run a backbone without values, to see which of its parameters are used."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn


def parameters_without_gradient(
    host: nn.Module, names: Sequence[str]
) -> Optional[list[str]]:
    """Run a backbone forward and backward on the meta device.

    Takes neither memory nor noticeable time, leaves the backbone as it is and
    draws no random numbers.

    Args:
        host (nn.Module): A backbone for images.
        names (Sequence[str]): Parameters of it that require gradients.

    Returns:
        list[str], optional: Those of ``names`` on which no output depends;
        None if the backbone cannot run like that.
    """
    tensors = [*host.parameters(), *host.buffers()]
    if not tensors:
        return None
    # Instead of copies of the weights, which may be large.
    memo = {id(tensor): _without_values(tensor) for tensor in tensors}
    size = getattr(host, 'img_size', 224)
    try:
        height, width = (size, size) if isinstance(size, int) else size
        twin = copy.deepcopy(host, memo)
        images = tensors[0].new_zeros(2, 3, height, width, device='meta')
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = [o for o in _tensors(twin(images)) if o.requires_grad]
            if outputs:  # none: not one parameter is used
                sum(out.sum() for out in outputs).backward()
    except Exception:  # whatever it is that this backbone cannot do so
        return None
    params = dict(twin.named_parameters(remove_duplicate=False))
    return [name for name in names if params[name].grad is None]


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
