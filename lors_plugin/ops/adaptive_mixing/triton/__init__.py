"""Triton kernels of adaptive mixing; imports Triton, so import it late."""

from .launch import backward, forward

__all__ = ['backward', 'forward']
