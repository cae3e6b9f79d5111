# LoRA beside every pointwise convolution of a frozen MobileNetV2.
_base_ = './lors-adamixer_mobilenetv2-full_49-queries_bccd.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='lors_plugin.RepAdapterHook',
        method='lora',
        targets=[
            r'layer\d+\.\d+\.(expand|linear)_conv\.conv',
            r'conv2\.conv',
        ],
        rank=32,
        alpha=32,
    ),
]

# The backbone's fifth of the learning rate is for full tuning.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0)))
)
