"""What gives the decoder its first queries."""

from .query_generator import InitialQueryGenerator

__all__ = ['InitialQueryGenerator']
