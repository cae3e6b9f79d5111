"""The dynamic convolution layer."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Optional, Union

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.ops import dynamic_conv2d
from lors_plugin.ops.backend import BACKENDS
from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    check_at_least,
    check_choice,
    check_divisible,
    check_positive,
)

from .routing import ROUTINGS, ExpertRouter, average

DEFAULT_INIT = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


def reset_experts(
    weight: Tensor,
    bias: Optional[Tensor],
    router: Optional[ExpertRouter],
    init: Callable[[Tensor], Tensor] = DEFAULT_INIT,
) -> None:
    """Let a mixture start with the statistics of one plain layer.

    A mixture of ``M`` independent kernels with the weights ``a`` has ``M
    a^2`` times their variance, which is divided out.

    Args:
        weight (Tensor): Shape (M, C_out, ...); written.
        bias (Tensor, optional): Shape (M, C_out); written.
        router (ExpertRouter, optional): None for a plain layer.
        init (Callable): Initialises the weight of a plain layer in place.
            Defaults to what ``nn.Conv2d`` and ``nn.Linear`` do.
    """
    gain = 1.0
    if router is not None:
        router.reset_parameters()
        gain = 1 / (router.start * math.sqrt(len(weight)))
    bound = 1 / math.sqrt(weight[0, 0].numel())
    with torch.no_grad():
        for expert in weight:
            init(expert)
        weight.mul_(gain)
        if bias is not None:
            bias.uniform_(-bound * gain, bound * gain)


@MODELS.register_module()
class DynamicConv2d(BaseModule):
    """A convolution whose kernel is mixed for each image.

    Paper: `ParameterNet <https://arxiv.org/abs/2306.14525>`_, section 3.2.
    About ``M + 1 / k^2`` times the parameters of a plain convolution and
    hardly more multiply-adds. Hosts build it by
    ``conv_cfg=dict(type='lors_plugin.DynamicConv2d')``.

    Args:
        in_channels (int): Channels ``C_in``.
        out_channels (int): Channels ``C_out``.
        kernel_size (int | Sequence[int]): One value or (y, x).
        stride (int | Sequence[int]): Defaults to 1.
        padding (int | Sequence[int] | str): Of zeros; or 'same' (stride 1)
            or 'valid', as in ``nn.Conv2d``. Defaults to 0.
        dilation (int | Sequence[int]): Defaults to 1.
        groups (int): Defaults to 1.
        bias (bool): Whether experts have a bias. Defaults to False.
        num_experts (int): ``M``; 1 is a plain convolution. Defaults to 4.
        routing (str): Of :class:`ExpertRouter`. Defaults to 'softmax_mlp'.
        temperature (float): Of :class:`ExpertRouter`. Defaults to 1.
        backend (str): Of :func:`lors_plugin.ops.dynamic_conv2d`.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    # What hosts ask of any convolution.
    transposed = False
    output_padding = (0, 0)
    padding_mode = 'zeros'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, Sequence[int]],
        stride: Union[int, Sequence[int]] = 1,
        padding: Union[int, Sequence[int], str] = 0,
        dilation: Union[int, Sequence[int]] = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        routing: str = 'softmax_mlp',
        temperature: float = 1.0,
        backend: str = 'auto',
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least('in_channels', in_channels, 1)
        check_at_least('out_channels', out_channels, 1)
        check_at_least('groups', groups, 1)
        width = check_divisible('in_channels', in_channels, 'groups', groups)
        check_divisible('out_channels', out_channels, 'groups', groups)
        check_at_least('num_experts', num_experts, 1)
        check_choice('routing', routing, ROUTINGS)
        check_positive('temperature', temperature)
        check_choice('backend', backend, BACKENDS)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair('kernel_size', kernel_size, 1)
        self.stride = pair('stride', stride, 1)
        self.dilation = pair('dilation', dilation, 1)
        if isinstance(padding, str):
            padding = self._named_padding(padding)
        self.padding = pair('padding', padding, 0)
        self.groups = groups
        self.num_experts = num_experts
        self.backend = backend
        shape = num_experts, out_channels, width, *self.kernel_size
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_channels))
        self.routing = None
        if num_experts > 1:
            self.routing = ExpertRouter(
                in_channels, num_experts, routing, temperature
            )
        self.reset_parameters()

    def _named_padding(self, name: str) -> tuple[int, ...]:
        if name == 'valid':
            return 0, 0
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        if name != 'same' or max(self.stride) > 1 or any(r % 2 for r in reach):
            raise ValueError(
                f"padding={name!r} must be whole numbers, 'valid', or 'same' "
                'with stride 1 and a kernel that reaches as far on both sides'
            )
        return tuple(r // 2 for r in reach)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> 'DynamicConv2d':
        """Let ``.to(memory_format=torch.channels_last)`` meet 4D tensors.

        Experts have five dimensions, and stay contiguous: they are rows of
        the matrix that kernels are mixed from.
        """

        def apply(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            out = fn(tensor.flatten(0, 1)).contiguous()
            return out.unflatten(0, tensor.shape[:2])

        return super()._apply(apply, recurse)

    def reset_parameters(
        self, init: Callable[[Tensor], Tensor] = DEFAULT_INIT
    ) -> None:
        """Start with the statistics of a plain convolution.

        Args:
            init (Callable): Initialises the kernel of a plain convolution,
                shape (C_out, C_in / groups, kh, kw), in place. Defaults to
                what ``nn.Conv2d`` does.
        """
        reset_experts(self.weight, self.bias, self.routing, init)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each image with its mixture of kernels.

        Args:
            x (Tensor): Shape (B, C_in, H, W).

        Returns:
            Tensor: Shape (B, C_out, H_out, W_out).
        """
        geometry = self.stride, self.padding, self.dilation, self.groups
        if self.routing is None:
            bias = None if self.bias is None else self.bias[0]
            return nn.functional.conv2d(x, self.weight[0], bias, *geometry)
        attention = self.routing(average(x, (2, 3)))
        return dynamic_conv2d(
            x, self.weight, attention, self.bias, *geometry, self.backend
        )

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, '
            f'kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, '
            f'groups={self.groups}, bias={self.bias is not None}, '
            f'num_experts={self.num_experts}'
        )


def pair(
    name: str, value: Union[int, Sequence[int]], minimum: int
) -> tuple[int, int]:
    """Return (y, x) of one or two whole numbers.

    Raises:
        ValueError: If it is something else; names the option.
    """
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, Sequence) or len(both) != 2:
        raise ValueError(f'{name}={value!r} must be one or two whole numbers')
    for number in both:
        check_at_least(name, number, minimum)
    return tuple(both)
