# Mask R-CNN on a frozen ConvNeXt-T with adapters; neck and heads are trained.
_base_ = (
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
)

custom_imports = dict(
    imports=['lors_plugin', 'mmpretrain.models'], allow_failed_imports=False
)

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

# Without the host's decay of the rate by layers, which is for full tuning.
optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys=dict(
            rep_adapter=dict(lr_mult=10.0), norm=dict(decay_mult=0.0)
        ),
    ),
)
