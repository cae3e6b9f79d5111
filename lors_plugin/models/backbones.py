"""Import path of earlier versions for :mod:`lors_plugin.parameternet`."""

from . import ParameterNet, dynamic_swin_transformer

__all__ = ['ParameterNet', 'dynamic_swin_transformer']
