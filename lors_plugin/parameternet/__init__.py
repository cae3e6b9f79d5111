"""ParameterNet: backbones with dynamic convolutions, for both hosts.

Paper: `ParameterNet <https://arxiv.org/abs/2306.14525>`_. Nothing here
imports MMDetection.
"""

from .backbone import ParameterNet
from .dynamic_conv import DynamicConv2d
from .dynamic_linear import DynamicLinear
from .dynamic_model import build_dynamic_model, make_dynamic
from .dynamic_swin import dynamic_swin_transformer
from .rep_conv import RepConv2d
from .routing import ExpertRouter

__all__ = [
    'DynamicConv2d',
    'DynamicLinear',
    'ExpertRouter',
    'ParameterNet',
    'RepConv2d',
    'build_dynamic_model',
    'dynamic_swin_transformer',
    'make_dynamic',
]
