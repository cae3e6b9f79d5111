"""Backbones for both hosts; nothing here imports MMDetection."""

from .parameternet import ParameterNet

__all__ = ['ParameterNet']
