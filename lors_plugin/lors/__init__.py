"""LORS for any stack of linear layers, in any model."""

from .entry import build_lors_stack
from .factors import Factors, factorize
from .linear import LowRankResidualLinear
from .low_rank import AdaptiveLowRankStack, LowRankLinearStack
from .share import SharedStack, ShareReport, share_stack

__all__ = [
    'AdaptiveLowRankStack',
    'Factors',
    'LowRankLinearStack',
    'LowRankResidualLinear',
    'ShareReport',
    'SharedStack',
    'build_lors_stack',
    'factorize',
    'share_stack',
]
