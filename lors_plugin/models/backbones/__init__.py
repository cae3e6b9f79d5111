"""Backbones for both hosts; nothing here imports MMDetection."""

from .dynamic_swin import dynamic_swin_transformer
from .parameternet import ParameterNet

__all__ = ['ParameterNet', 'dynamic_swin_transformer']
