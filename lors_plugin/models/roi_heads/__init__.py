"""Decoders: stages of queries that refine boxes."""

from .adamixer_decoder import AdaMixerDecoder
from .adamixer_stage import AdaMixerStage
from .lors_adamixer_decoder import LORSAdaMixerDecoder

__all__ = ['AdaMixerDecoder', 'AdaMixerStage', 'LORSAdaMixerDecoder']
