"""Modules over :mod:`lors_plugin.ops`, free of any detector."""

from .adaptive_mixing import AdaptiveMixing, LORSAdaptiveMixing, PrivateMixing
from .adaptive_sampling import AdaptiveSampling3D
from .box_attention import BoxSelfAttention
from .dynamic_conv import DynamicConv2d
from .dynamic_linear import DynamicLinear
from .low_rank import AdaptiveLowRankStack, LowRankLinearStack
from .norm import GroupNorm, LayerNorm
from .rep_conv import RepConv2d
from .routing import ExpertRouter

__all__ = [
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'DynamicConv2d',
    'DynamicLinear',
    'ExpertRouter',
    'GroupNorm',
    'LORSAdaptiveMixing',
    'LayerNorm',
    'LowRankLinearStack',
    'PrivateMixing',
    'RepConv2d',
]
