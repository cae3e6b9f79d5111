# Adapters before every pointwise convolution of a frozen MobileNetV2; they
# vanish into these convolutions.
_base_ = '../lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

# A frozen stage would freeze its adapters as well; the hook freezes the rest.
model = dict(backbone=dict(frozen_stages=-1))

custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='lors_plugin.RepAdapterHook',
        targets=[
            r'layer\d+\.\d+\.(expand|linear)_conv\.conv',
            r'conv2\.conv',
        ],
        hidden_dims=32,
        scale=1.0,
    ),
]

# The backbone's fifth of the learning rate is not for adapters.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=1.0)))
)
