_base_ = './adamixer_r50.py'

model = dict(
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        num_groups=2,
        in_points=64,
        adaptive_ranks=16,
        static_ranks=8,
    )
)
