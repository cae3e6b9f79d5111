"""Everything that merges for inference, behind one function."""

from .merge import MergeError, reparameterize, unmerge

__all__ = ['MergeError', 'reparameterize', 'unmerge']
