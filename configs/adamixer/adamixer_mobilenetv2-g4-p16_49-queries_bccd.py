# AdaMixer made for two CPU cores, for docs/en/benchmarks/bccd.md: a narrow
# decoder of six stages that, as in the paper, is mixing for nine tenths.
_base_ = [
    '../_base_/models/adamixer_r50.py',
    '../_base_/datasets/bccd.py',
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
    neck=dict(in_channels=[32, 96, 1280], out_channels=64),
    # A photo is full of cells, which are little larger than those of a grid.
    query_generator=dict(num_queries=49, embed_dims=64, initial_boxes='grid'),
    decoder=dict(
        num_classes=3,
        embed_dims=64,
        strides=(8, 16, 32),
        num_groups=4,
        in_points=16,
        out_points=64,
        feedforward_channels=128,
    ),
)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=6, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.2))),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=6,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=100, save_optimizer=False, max_keep_ckpts=1),
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
