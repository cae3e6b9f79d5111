"""Modules over :mod:`lors_plugin.ops`, free of any detector."""

from .adaptive_mixing import AdaptiveMixing, LORSAdaptiveMixing, PrivateMixing
from .adaptive_sampling import AdaptiveSampling3D
from .box_attention import BoxSelfAttention
from .low_rank import AdaptiveLowRankStack, LowRankLinearStack
from .norm import GroupNorm, LayerNorm

__all__ = [
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'GroupNorm',
    'LORSAdaptiveMixing',
    'LayerNorm',
    'LowRankLinearStack',
    'PrivateMixing',
]
