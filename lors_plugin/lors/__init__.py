"""LORS: layers of a stack share most of their weights."""

from .adaptive_stack import AdaptiveLowRankStack
from .linear import LinearStack, LowRankLinearStack, LowRankResidualLinear
from .plain_weights import Factors, factorize
from .share import SharedStack, ShareReport, build_lors_stack, share_stack

__all__ = [
    'AdaptiveLowRankStack',
    'Factors',
    'LinearStack',
    'LowRankLinearStack',
    'LowRankResidualLinear',
    'ShareReport',
    'SharedStack',
    'build_lors_stack',
    'factorize',
    'share_stack',
]
