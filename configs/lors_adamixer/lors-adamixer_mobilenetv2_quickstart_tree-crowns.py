# The quick start: a small LORS-AdaMixer for two CPU cores, trained from a
# MobileNetV2 of ImageNet on a few aerial photos in some minutes.
_base_ = [
    '../_base_/models/adamixer_r50.py',
    '../_base_/datasets/tree_crowns.py',
    '../_base_/default_runtime.py',
]

model = dict(
    # The early, large layers stay as they are: they cost most and know most.
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(2, 4, 7),
        frozen_stages=4,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/mobilenetv2_trunk.pth'
        ),
    ),
    neck=dict(in_channels=[32, 96, 1280], out_channels=96),
    # A tile is full of crowns of about the size of a cell.
    query_generator=dict(num_queries=64, embed_dims=96, initial_boxes='grid'),
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        num_classes=1,
        num_stages=3,
        embed_dims=96,
        strides=(8, 16, 32),
        num_groups=2,
        in_points=16,
        out_points=32,
        feedforward_channels=384,
        adaptive_ranks=8,
        static_ranks=8,
    ),
)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=15, val_interval=3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.2))),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=15,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=5, max_keep_ckpts=1)
)
# Weights averaged over the last hundred steps are what is evaluated.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExponentialMovingAverage',
        momentum=0.01,
        update_buffers=True,
    )
]
