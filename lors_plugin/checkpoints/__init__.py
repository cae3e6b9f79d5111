"""Checkpoints of the original programs, and checkpoint files."""

from .backbones import backbone_problems
from .convert import (
    ConversionError,
    backbone_keys,
    guess_source,
    to_lors_plugin,
    to_original,
)
from .files import load_checkpoint_file, save_checkpoint_file, weights_of

__all__ = [
    'ConversionError',
    'backbone_keys',
    'backbone_problems',
    'guess_source',
    'load_checkpoint_file',
    'save_checkpoint_file',
    'to_lors_plugin',
    'to_original',
    'weights_of',
]
