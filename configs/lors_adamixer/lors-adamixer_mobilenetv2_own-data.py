# For data of your own on a machine without a GPU: what the copy of
# lors-adamixer_r50_own-data.py says, with the small model of the quick start.
# Copy this file too, and name your copy of the other one here.
_base_ = './lors-adamixer_r50_own-data.py'

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
    # A grid of boxes needs fewer steps to learn than boxes as large as the
    # image, from which queries of the paper start.
    query_generator=dict(embed_dims=96, initial_boxes='grid'),
    decoder=dict(
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

# For 4 images a step; `--auto-scale-lr` adapts it.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.2))),
)
auto_scale_lr = dict(base_batch_size=4)
# Weights averaged over the last hundred steps are what is evaluated.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExponentialMovingAverage',
        momentum=0.01,
        update_buffers=True,
    )
]
