_base_ = '../adamixer/adamixer_r50_8xb2-1x_coco.py'

model = dict(
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        num_groups=2,
        in_points=64,
        adaptive_ranks=16,
        adaptive_groups=[1, 1, 2, 2, 3, 3],
        static_ranks=8,
    )
)
