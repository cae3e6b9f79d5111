"""Everything that registers a model; imported when a config needs it."""

from lors_plugin.adapters import build_adapted_model
from lors_plugin.compat import (
    drop_debug_messages,
    explain_import,
    register_configs,
    register_safe_globals,
    repair_grounding_dino,
)
from lors_plugin.lors import (
    AdaptiveLowRankStack,
    LowRankLinearStack,
    build_lors_stack,
)
from lors_plugin.parameternet import (
    DynamicConv2d,
    DynamicLinear,
    ExpertRouter,
    ParameterNet,
    RepConv2d,
    build_dynamic_model,
    dynamic_swin_transformer,
)

from .simple_feature_pyramid import SimpleFeaturePyramid

try:
    drop_debug_messages()  # of MMDetection's import
    from lors_plugin.adamixer import (
        AdaMixer,
        AdaMixerDecoder,
        AdaMixerStage,
        AdaptiveMixing,
        AdaptiveSampling3D,
        BoxSelfAttention,
        InitialQueryGenerator,
        LORSAdaMixerDecoder,
        LORSAdaptiveMixing,
        SharedNormChannelMapping,
    )
except TypeError as error:
    raise explain_import(error) from None

register_safe_globals()
register_configs()
repair_grounding_dino()

# Functions that build, under the names that configs have for them.
AdaptedModel = build_adapted_model
DynamicModel = build_dynamic_model
DynamicSwinTransformer = dynamic_swin_transformer
LORSStack = build_lors_stack

__all__ = [
    'AdaMixer',
    'AdaMixerDecoder',
    'AdaMixerStage',
    'AdaptedModel',
    'AdaptiveLowRankStack',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'DynamicConv2d',
    'DynamicLinear',
    'DynamicModel',
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
    'SimpleFeaturePyramid',
]
