"""Models without memory for their weights, that run all the same.

A forward pass on ``FakeTensor`` computes shapes and nothing else, so that
the largest detector is counted in a second, in no memory to speak of.
Unlike the meta device it claims to be a CPU, and code that asks for the
device takes the way that it takes for real.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

# Those that say how large and not what: the rest keeps its values, which
# models read while they are built (`linspace` for drop path rates).
_EMPTY = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class EmptyWeights(TorchFunctionMode):
    """Build a model with its weights on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _EMPTY and kwargs.get('device') is None:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


class WeightlessModel:
    """A model whose weights and buffers take no memory.

    Used as a context: tensors that are made inside are fake, too.

    Args:
        model (nn.Module): Changed in place; on any device, also meta.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = self._shared(tensor)

    def _shared(self, tensor: Tensor) -> Tensor:
        """A fake twin; the same one for a tensor that is used twice."""
        twins = self.__dict__.setdefault('_twins', {})
        if id(tensor) not in twins:
            # The tensor is kept, so that nothing else gets its id.
            twins[id(tensor)] = (tensor, self._fake(tensor))
        return twins[id(tensor)][1]

    def _fake(self, tensor: Tensor) -> Tensor:
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cpu'
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake

    def __enter__(self) -> 'WeightlessModel':
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
