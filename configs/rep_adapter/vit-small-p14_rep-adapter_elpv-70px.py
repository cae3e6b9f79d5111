# Adapters before attention and FFN, and the classifier.
_base_ = './vit-small-p14_full_elpv-70px.py'

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        placement='block',
        hidden_dims=8,
        scale=1.0,
    )
]

optim_wrapper = dict(optimizer=dict(lr=1e-3))
