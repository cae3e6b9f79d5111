"""Merge a trained model for inference, and take it back."""

from .reparameterize import MergeError, reparameterize, unmerge

__all__ = ['MergeError', 'reparameterize', 'unmerge']
