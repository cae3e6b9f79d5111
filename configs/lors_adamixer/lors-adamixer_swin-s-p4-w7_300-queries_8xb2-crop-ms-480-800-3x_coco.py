_base_ = '../adamixer/adamixer_swin-s-p4-w7_300-queries_8xb2-crop-ms-480-800-3x_coco.py'  # noqa: E501

model = dict(
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        num_groups=2,
        in_points=64,
        adaptive_ranks=16,
        static_ranks=8,
    )
)
