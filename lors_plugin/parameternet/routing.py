"""Expert router: the weight of each expert for an image."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    at_least_float32,
    check_at_least,
    check_choice,
    check_positive,
)

ROUTINGS = ('softmax_mlp', 'sigmoid_linear')


def average(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Average over positions, as routers take it.

    A sum, whose gradient is an expanded view: that of ``Tensor.mean`` would
    be one more tensor of the size of ``x``.

    Args:
        x (Tensor): Any shape.
        dims (Sequence[int]): Dimensions to average over.

    Returns:
        Tensor: ``x`` without these dimensions, float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = 1
    for dim in dims:
        length = length * x.shape[dim]
    return x.sum(dims, dtype=dtype) * (1 / length)


@MODELS.register_module()
class ExpertRouter(BaseModule):
    """Compute the weight of each expert from the mean of a layer's input.

    Paper: `ParameterNet: Parameters Are All You Need for Large-scale Visual
    Pretraining of Mobile Networks <https://arxiv.org/abs/2306.14525>`_,
    section 3.2. Starts with nearly the same weight for all experts. Under
    autocast it computes in float32.

    Args:
        in_channels (int): Channels ``C``.
        num_experts (int): ``M``.
        routing (str): 'softmax_mlp' as in the paper: one hidden layer of
            ``C`` units with ReLU, then softmax; or 'sigmoid_linear' as in
            the released program: one linear layer, then a sigmoid, so that
            the weights do not sum to 1.
        temperature (float): The logits are divided by it. Defaults to 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        routing: str = 'softmax_mlp',
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice('routing', routing, ROUTINGS)
        check_at_least('in_channels', in_channels, 1)
        check_at_least('num_experts', num_experts, 1)
        check_positive('temperature', temperature)
        self.routing = routing
        self.temperature = temperature
        if routing == 'softmax_mlp':
            self.hidden = nn.Linear(in_channels, in_channels)
        self.fc = nn.Linear(in_channels, num_experts)
        self.reset_parameters()

    @property
    def start(self) -> float:
        """float: The weight that each expert starts with, nearly."""
        softmax = self.routing == 'softmax_mlp'
        return 1 / self.fc.out_features if softmax else 0.5

    def reset_parameters(self) -> None:
        """Kaiming for the hidden layer, nearly zero for the last."""
        if self.routing == 'softmax_mlp':
            nn.init.kaiming_normal_(self.hidden.weight)
            nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Weigh the experts.

        Args:
            pooled (Tensor): Mean of each image, shape (B, C).

        Returns:
            Tensor: Shape (B, M), float32 or wider.
        """
        if torch.is_autocast_enabled(pooled.device.type):
            with torch.autocast(pooled.device.type, enabled=False):
                return self.forward(at_least_float32(pooled))
        # The weight of a quantised layer is a method.
        fc = self.fc
        x = pooled.to(getattr(fc.weight, 'dtype', torch.float32))
        if self.routing == 'softmax_mlp':
            x = self.hidden(x).relu()
        logits = at_least_float32(fc(x))
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.routing == 'softmax_mlp':
            return logits.softmax(-1)
        return logits.sigmoid()

    def extra_repr(self) -> str:
        return f'routing={self.routing!r}, temperature={self.temperature}'
