"""Decoders: stages of queries that refine boxes."""

from .adamixer_decoder import AdaMixerDecoder
from .lors_adamixer_decoder import LORSAdaMixerDecoder

__all__ = ['AdaMixerDecoder', 'LORSAdaMixerDecoder']
