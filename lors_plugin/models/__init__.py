"""Everything that registers a model; imported when a config needs it."""

from lors_plugin.compat import register_safe_globals
from lors_plugin.lors import build_lors_stack

from .backbones import ParameterNet, dynamic_swin_transformer
from .dense_heads import InitialQueryGenerator
from .detectors import AdaMixer
from .layers import (
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
from .necks import SharedNormChannelMapping
from .roi_heads import AdaMixerDecoder, AdaMixerStage, LORSAdaMixerDecoder

register_safe_globals()

# Functions that build, under the names that configs have for them.
DynamicSwinTransformer = dynamic_swin_transformer
LORSStack = build_lors_stack

__all__ = [
    'AdaMixer',
    'AdaMixerDecoder',
    'AdaMixerStage',
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'DynamicConv2d',
    'DynamicLinear',
    'DynamicSwinTransformer',
    'ExpertRouter',
    'InitialQueryGenerator',
    'LORSAdaMixerDecoder',
    'LORSAdaptiveMixing',
    'LORSStack',
    'LowRankLinearStack',
    'ParameterNet',
    'RepConv2d',
    'SharedNormChannelMapping',
]
