# UPerNet on a frozen Swin-T with adapters; its heads are trained.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'  # noqa: E501

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
model = dict(backbone=dict(drop_path_rate=0.0))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        # The norms of the outputs are of no classifier and begin untrained.
        trainable=[r'norm\d'],
        hidden_dims=8,
        scale=1.0,
    )
]

# Adapters learn as they are published.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=10.0))),
)
