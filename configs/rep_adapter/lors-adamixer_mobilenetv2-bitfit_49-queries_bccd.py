# The biases of a frozen MobileNetV2, which are those of its norms.
_base_ = './lors-adamixer_mobilenetv2-full_49-queries_bccd.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='lors_plugin.RepAdapterHook', method='bitfit'),
]

# The backbone's fifth of the learning rate is for full tuning.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0)))
)
