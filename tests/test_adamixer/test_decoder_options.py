"""Options of the decoders that are refused, and what the errors say."""

import re

import pytest

REFUSED = {
    'lors_option': (
        'adamixer',
        dict(adaptive_ranks=16, static_ranks=8),
        TypeError,
        "no option ['adaptive_ranks', 'static_ranks']: ['adaptive_ranks', "
        '\'static_ranks\'] belong to type="lors_plugin.LORSAdaMixerDecoder"',
    ),
    'unknown': (
        'adamixer',
        dict(num_layers=6),
        TypeError,
        "AdaMixerDecoder has no option ['num_layers']",
    ),
    'unknown_lors': (
        'lors',
        dict(rank=6),
        TypeError,
        "LORSAdaMixerDecoder has no option ['rank']",
    ),
    'groups_differ': (
        'lors',
        dict(num_groups=[1, 2, 2]),
        ValueError,
        'num_groups=[1, 2, 2] differs between stages',
    ),
    'points_differ': (
        'lors',
        dict(in_points=[4, 4, 9]),
        ValueError,
        'in_points=[4, 4, 9] differs between stages',
    ),
    'out_points_differ': (
        'lors',
        dict(out_points=[4, 4, 9]),
        ValueError,
        'out_points=[4, 4, 9] differs between stages',
    ),
    'ranks': (
        'lors',
        dict(adaptive_ranks=[8] * 6),
        ValueError,
        'adaptive_ranks=[8, 8, 8, 8, 8, 8] has 6 values for 3',
    ),
    'rank_groups': (
        'lors',
        dict(adaptive_groups=[1, 1]),
        ValueError,
        'adaptive_groups=[1, 1] has 2 values for 3',
    ),
    'static_ranks': (
        'lors',
        dict(static_ranks=[1]),
        ValueError,
        'static_ranks=[1] has 1 values for 3',
    ),
    'in_points': (
        'adamixer',
        dict(in_points=[4, 4]),
        ValueError,
        'in_points=[4, 4] has 2 values for 3',
    ),
    'no_points': (
        'adamixer',
        dict(out_points=0),
        ValueError,
        'out_points=0 must hold whole numbers of at least 1',
    ),
    'text': (
        'adamixer',
        dict(num_groups='4'),
        ValueError,
        'num_groups=4 must hold whole numbers',
    ),
    'features': (
        'adamixer',
        dict(feat_channels=30, num_groups=4),
        ValueError,
        'feat_channels=30 must be divisible by num_groups=4',
    ),
    'features_lors': (
        'lors',
        dict(num_groups=3),
        ValueError,
        'feat_channels=32 must be divisible by num_groups=3',
    ),
    'heads': (
        'lors',
        dict(num_heads=5),
        ValueError,
        'embed_dims=32 must be divisible by num_heads=5',
    ),
    'box_code': (
        'adamixer',
        dict(embed_dims=30, feat_channels=32),
        ValueError,
        'embed_dims=30 must be divisible by',
    ),
    'no_class': (
        'adamixer',
        dict(num_classes=0),
        ValueError,
        'num_classes=0',
    ),
    'no_stage': ('adamixer', dict(num_stages=0), ValueError, 'num_stages=0'),
    'init': (
        'lors',
        dict(generator_init='ones'),
        ValueError,
        "generator_init='ones'",
    ),
    'backend': (
        'adamixer',
        dict(backend='cuda'),
        ValueError,
        "backend='cuda' must be one of",
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, tiny_decoder):
    kind, options, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        tiny_decoder(kind, **options)
