# Cascade Mask R-CNN of MMDetection on a frozen Swin-T with adapters.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.0,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
        convert_weights=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        placement='block',
        hidden_dims=8,
        scale=1.0,
        # The norms of the outputs are of no classifier and begin untrained.
        trainable=[r'norm\d'],
    )
]

# MMDetection's recipe for Swin; adapters learn as they are published.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys=dict(
            rep_adapter=dict(lr_mult=10.0, decay_mult=0.002),
            norm=dict(decay_mult=0.0),
        )
    ),
)
