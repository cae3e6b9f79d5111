"""The ablations of AdaMixer: mixing, sampling, positions, sizes.

The default config is that of the paper, on COCO with eight GPUs' batches; any
other one with an AdaMixerDecoder is trained in its place by --config.
"""

from bccd import METRICS
from study import RESUMABLE, Run, Study

CONFIG = 'configs/adamixer/adamixer_r50_8xb2-1x_coco.py'
BASE = 'mixing/channel-spatial'
CHANNEL, SPATIAL = 'channel', 'spatial'
TABLES = {
    'mixing': {
        'channel-spatial': {},
        'channel': dict(mixing_steps=[CHANNEL]),
        'spatial': dict(mixing_steps=[SPATIAL]),
        'spatial-channel': dict(mixing_steps=[SPATIAL, CHANNEL]),
        'fixed-channel': dict(fixed_mixing=[CHANNEL]),
        'fixed-spatial': dict(fixed_mixing=[SPATIAL]),
        'fixed-both': dict(fixed_mixing=[CHANNEL, SPATIAL]),
    },
    'sampling': {'2D': dict(scale_offsets=False)},
    'positions': {
        'no-overlap-bias': dict(overlap_bias=False),
        'no-encoding': dict(position_encoding='none'),
        'neither': dict(overlap_bias=False, position_encoding='none'),
        'encoding-query-key': dict(position_encoding='query_key'),
    },
    'boxes': {'learned': {'query_generator.initial_boxes': 'learned'}},
    'groups': {str(n): dict(num_groups=n) for n in (1, 2, 8)},
    'points': {
        f'{p}-in-{q}-out': dict(in_points=p, out_points=q)
        for p, q in ((16, 128), (64, 128), (32, 64), (32, 256))
    },
    'stages': {str(n): dict(num_stages=n) for n in (3, 9)},
}


def options_of(row):
    """Name the entries of a config; those of the decoder have no dot."""
    return {
        f'model.{key if "." in key else "decoder." + key}': value
        for key, value in row.items()
    }


STUDY = Study(
    title='AdaMixer: what its parts bring',
    page='docs/en/user_guides/own_data.md',
    runs=[
        Run(
            f'{table}/{name}',
            CONFIG,
            {**RESUMABLE, **options_of(row)},
            against=None if f'{table}/{name}' == BASE else BASE,
        )
        for table, rows in TABLES.items()
        for name, row in rows.items()
    ],
    metrics=METRICS,
    parts=dict(decoder='decoder', mixing='decoder.mixing'),
)
