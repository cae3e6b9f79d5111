"""The cost of a model: parameters, multiply-adds, activation memory."""

from lors_plugin.build import test_shape
from lors_plugin.parameternet.expert_usage import (
    ExpertUsage,
    LayerUsage,
    collapsed_layers,
    usage_table,
)

from .counts import (
    ConfigCounts,
    ModelCounts,
    OperatorCounter,
    PartCounts,
    UncountableError,
    count_config,
    count_model,
    make_forward,
)
from .parts import part_of
from .weightless import WeightlessModel

__all__ = [
    'ConfigCounts',
    'ExpertUsage',
    'LayerUsage',
    'ModelCounts',
    'OperatorCounter',
    'PartCounts',
    'UncountableError',
    'WeightlessModel',
    'collapsed_layers',
    'count_config',
    'count_model',
    'make_forward',
    'part_of',
    'test_shape',
    'usage_table',
]
