"""Tensors in, tensors out. This package imports torch and nothing else.

One legend for all shapes: ``B`` images, ``N`` queries, ``G`` groups, ``P``
sampled points a group, ``Q`` mixed points a group, ``C`` channels a group,
``K`` parameter groups, ``r`` rank, ``L`` levels, ``M`` experts.
"""

from .adaptive_mixing import LowRank, adaptive_mixing, generated_mixing
from .dynamic_conv import dynamic_conv2d, dynamic_linear
from .sampling_3d import SharedLevels, sampling_3d, share_levels

__all__ = [
    'LowRank',
    'SharedLevels',
    'adaptive_mixing',
    'dynamic_conv2d',
    'dynamic_linear',
    'generated_mixing',
    'sampling_3d',
    'share_levels',
]
