"""Everything that merges for inference, behind one function."""

from .checks import MergeError
from .merge import reparameterize, unmerge

__all__ = ['MergeError', 'reparameterize', 'unmerge']
