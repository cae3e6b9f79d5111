_base_ = '../adamixer/adamixer_r50_8xb2-1x_coco.py'

model = dict(
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        num_groups=2,
        in_points=64,
        adaptive_ranks=16,
        static_ranks=8,
    )
)
