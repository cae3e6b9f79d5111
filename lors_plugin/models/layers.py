"""Import path of earlier versions for layers, which live with their paper."""

from . import (
    AdaptiveLowRankStack,
    AdaptiveMixing,
    AdaptiveSampling3D,
    BoxSelfAttention,
    DynamicConv2d,
    DynamicLinear,
    ExpertRouter,
    LORSAdaptiveMixing,
    LowRankLinearStack,
    RepConv2d,
)

__all__ = [
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'DynamicConv2d',
    'DynamicLinear',
    'ExpertRouter',
    'LORSAdaptiveMixing',
    'LowRankLinearStack',
    'RepConv2d',
]
