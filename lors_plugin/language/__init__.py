"""ParameterNet's language part: mixtures of experts in Hugging Face LLaMA.

Paper: `ParameterNet <https://arxiv.org/abs/2306.14525>`_, last part. Works
on models of ``transformers``, which stays optional: only
:func:`load_with_experts` imports it.
"""

from .experts import (
    add_experts,
    auxiliary_loss,
    expert_layers,
    expert_load,
    load_with_experts,
)
from .switch_linear import SwitchLinear

__all__ = [
    'SwitchLinear',
    'add_experts',
    'auxiliary_loss',
    'expert_layers',
    'expert_load',
    'load_with_experts',
]
