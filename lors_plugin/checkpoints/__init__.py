"""Checkpoints of the original programs, and checkpoint files."""

from .backbones import backbone_problems
from .convert import (
    ConversionError,
    backbone_keys,
    guess_source,
    is_converted,
    to_lors_plugin,
    to_original,
)
from .files import (
    MissingCheckpointError,
    load_checkpoint_file,
    read_weights,
    save_checkpoint_file,
    weights_of,
)
from .plain_data import load_pickle_file

__all__ = [
    'ConversionError',
    'MissingCheckpointError',
    'backbone_keys',
    'backbone_problems',
    'guess_source',
    'is_converted',
    'load_checkpoint_file',
    'load_pickle_file',
    'read_weights',
    'save_checkpoint_file',
    'to_lors_plugin',
    'to_original',
    'weights_of',
]
