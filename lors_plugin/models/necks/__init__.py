"""Necks."""

from .channel_mapping import SharedNormChannelMapping

__all__ = ['SharedNormChannelMapping']
