"""Everything that registers a model; imported when a config needs it."""

from lors_plugin.compat import register_safe_globals
from lors_plugin.lors import build_lors_stack

from .backbones import ParameterNet
from .dense_heads import InitialQueryGenerator
from .detectors import AdaMixer
from .layers import (
    AdaptiveLowRankStack,
    AdaptiveMixing,
    AdaptiveSampling3D,
    BoxSelfAttention,
    LORSAdaptiveMixing,
    LowRankLinearStack,
)
from .necks import SharedNormChannelMapping
from .roi_heads import AdaMixerDecoder, AdaMixerStage, LORSAdaMixerDecoder

register_safe_globals()

__all__ = [
    'AdaMixer',
    'AdaMixerDecoder',
    'AdaMixerStage',
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'InitialQueryGenerator',
    'LORSAdaMixerDecoder',
    'LORSAdaptiveMixing',
    'LowRankLinearStack',
    'ParameterNet',
    'SharedNormChannelMapping',
    'build_lors_stack',
]
