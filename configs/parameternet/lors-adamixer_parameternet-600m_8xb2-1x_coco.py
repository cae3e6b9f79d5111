# Weights of ImageNet are to be trained first, or converted from released
# ones; without the file the backbone starts at random, which 12 epochs are
# too few for.
_base_ = '../lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.ParameterNet',
        arch='600m',
        out_indices=(2, 4, 6, 8),
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/parameternet_600m.pth',
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[44, 76, 212, 304]),
)
