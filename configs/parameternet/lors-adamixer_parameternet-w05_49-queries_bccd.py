# No pretrained weights: what there is to learn of in BCCD is learned anew, so
# that this shows that it works and no accuracy.
_base_ = '../lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.ParameterNet',
        arch='600m',
        width=0.5,
        out_indices=(4, 6, 8),
    ),
    neck=dict(in_channels=[20, 56, 80]),
)

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0)))
)
