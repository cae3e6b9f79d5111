"""How much of each expert an image gets."""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from lors_plugin.registry import MODELS
from lors_plugin.utils import at_least_float32

ROUTINGS = ('softmax_mlp', 'sigmoid_linear')


@MODELS.register_module()
class ExpertRouter(BaseModule):
    """From the mean of a layer's input to a weight for each expert.

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
        if routing not in ROUTINGS:
            raise ValueError(f'routing={routing!r} must be one of {ROUTINGS}')
        if temperature <= 0:
            raise ValueError(f'temperature={temperature} must be positive')
        self.routing = routing
        self.temperature = temperature
        if routing == 'softmax_mlp':
            self.hidden = nn.Linear(in_channels, in_channels)
        self.fc = nn.Linear(in_channels, num_experts)
        self.reset_parameters()

    @property
    def start(self) -> float:
        """float: What each expert's weight starts near to."""
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
        x = pooled.to(self.fc.weight.dtype)
        if self.routing == 'softmax_mlp':
            x = self.hidden(x).relu()
        logits = at_least_float32(self.fc(x))
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.routing == 'softmax_mlp':
            return logits.softmax(-1)
        return logits.sigmoid()

    def extra_repr(self) -> str:
        return f'routing={self.routing!r}, temperature={self.temperature}'
