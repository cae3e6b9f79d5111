# Adapters before attention and FFN, and the classifier, as published. The
# scale is searched per task: tools/studies/run.py rep_adapter_scale.
_base_ = './vit-base-p16_full_1xb64-100e_vtab-1k.py'

model = dict(backbone=dict(drop_path_rate=0.1))

optim_wrapper = dict(optimizer=dict(lr=1e-3))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        placement='block',
        hidden_dims=8,
        groups=2,
        scale=1.0,
        dropout=0.1,
    )
]
