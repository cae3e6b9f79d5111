# Segmenter on a frozen ViT-S with adapters; its decoder is trained.
_base_ = 'mmseg::segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
model = dict(backbone=dict(drop_path_rate=0.0))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
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
