"""The dynamic linear layer, for transformers."""

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.ops import dynamic_linear
from lors_plugin.ops.backend import BACKENDS
from lors_plugin.registry import MODELS
from lors_plugin.utils import check_at_least, check_choice, check_positive

from .dynamic_conv import DEFAULT_INIT, reset_experts
from .routing import ROUTINGS, ExpertRouter, average


@MODELS.register_module()
class DynamicLinear(BaseModule):
    """A linear layer whose matrix is mixed for each image.

    Args:
        in_features (int): Width ``C_in``.
        out_features (int): Width ``C_out``.
        bias (bool): Whether experts have a bias. Defaults to True.
        num_experts (int): ``M``; 1 is a plain layer. Defaults to 4.
        routing (str): Of :class:`ExpertRouter`. Defaults to 'softmax_mlp'.
        temperature (float): Of :class:`ExpertRouter`. Defaults to 1.
        backend (str): Of :func:`lors_plugin.ops.dynamic_linear`.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        num_experts: int = 4,
        routing: str = 'softmax_mlp',
        temperature: float = 1.0,
        backend: str = 'auto',
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least('in_features', in_features, 1)
        check_at_least('out_features', out_features, 1)
        check_at_least('num_experts', num_experts, 1)
        check_choice('routing', routing, ROUTINGS)
        check_positive('temperature', temperature)
        check_choice('backend', backend, BACKENDS)
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts
        self.backend = backend
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features)
        )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.routing = None
        if num_experts > 1:
            self.routing = ExpertRouter(
                in_features, num_experts, routing, temperature
            )
        self.reset_parameters()

    def reset_parameters(
        self, init: Callable[[Tensor], Tensor] = DEFAULT_INIT
    ) -> None:
        """Start with the statistics of a plain layer.

        Args:
            init (Callable): Initialises the weight of a plain layer, shape
                (C_out, C_in), in place. Defaults to what ``nn.Linear`` does.
        """
        reset_experts(self.weight, self.bias, self.routing, init)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each image's tokens its mixture of matrices.

        Args:
            x (Tensor): Shape (B, ..., C_in). Each image is routed by its
                mean over the dimensions between.

        Returns:
            Tensor: Shape (B, ..., C_out).
        """
        if self.routing is None:
            bias = None if self.bias is None else self.bias[0]
            return F.linear(x, self.weight[0], bias)
        between = tuple(range(1, x.dim() - 1))
        attention = self.routing(average(x, between) if between else x)
        return dynamic_linear(
            x, self.weight, attention, self.bias, self.backend
        )

    def extra_repr(self) -> str:
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, '
            f'bias={self.bias is not None}, num_experts={self.num_experts}'
        )
