"""AdaMixer and LORS-AdaMixer: the detector, from image to criterion.

Papers: `AdaMixer <https://arxiv.org/abs/2203.16507>`_ and `LORS
<https://arxiv.org/abs/2403.04303>`_, section 3.4.
"""

from .criterion import SetCriterion
from .decoder import AdaMixerDecoder
from .detector import AdaMixer
from .lors_decoder import LORSAdaMixerDecoder
from .lors_mixing import LORSAdaptiveMixing
from .mixing import AdaptiveMixing
from .neck import SharedNormChannelMapping
from .query_generator import InitialQueryGenerator
from .sampling import AdaptiveSampling3D
from .self_attention import BoxSelfAttention
from .stage import AdaMixerStage
from .to_lors import to_lors

__all__ = [
    'AdaMixer',
    'AdaMixerDecoder',
    'AdaMixerStage',
    'AdaptiveMixing',
    'AdaptiveSampling3D',
    'BoxSelfAttention',
    'InitialQueryGenerator',
    'LORSAdaMixerDecoder',
    'LORSAdaptiveMixing',
    'SetCriterion',
    'SharedNormChannelMapping',
    'to_lors',
]
