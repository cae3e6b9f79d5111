"""Checkpoints of the original programs."""
from .convert import (ConversionError, guess_source, to_lors_plugin,
                      to_original)

__all__ = ['ConversionError', 'guess_source', 'to_lors_plugin', 'to_original']
