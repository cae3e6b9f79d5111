"""Checkpoints of the original programs, and checkpoint files."""

from .convert import ConversionError, guess_source, to_lors_plugin, to_original
from .files import load_checkpoint_file, save_checkpoint_file, weights_of

__all__ = [
    'ConversionError',
    'guess_source',
    'load_checkpoint_file',
    'save_checkpoint_file',
    'to_lors_plugin',
    'to_original',
    'weights_of',
]
