"""LORS: layers of a stack share most of their weights."""

from .adaptive_stack import AdaptiveLowRankStack
from .linear import LinearStack, LowRankLinearStack, LowRankResidualLinear
from .other_layers import (
    LowRankInProjection,
    LowRankMultiheadAttention,
    LowRankResidualConv2d,
)
from .plain_weights import Factors, factorize
from .share import SharedStack, ShareReport, build_lors_stack, share_stack

__all__ = [
    'AdaptiveLowRankStack',
    'Factors',
    'LinearStack',
    'LowRankInProjection',
    'LowRankLinearStack',
    'LowRankMultiheadAttention',
    'LowRankResidualConv2d',
    'LowRankResidualLinear',
    'ShareReport',
    'SharedStack',
    'build_lors_stack',
    'factorize',
    'share_stack',
]
