# Adapters before attention and FFN of a frozen backbone, and the decoder.
_base_ = './setr_vit-small-p14-full_camvid-168x126.py'

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        placement='block',
        hidden_dims=8,
        scale=1.0,
    )
]

# The backbone's hundredth of the learning rate is not for adapters.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=1.0)))
)
