# All weights are trained. The other ways to adapt this model begin here.
_base_ = [
    '../_base_/datasets/camvid.py',
    '../_base_/default_runtime_seg.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=_base_.scale[::-1],
        seg_pad_val=_base_.ignore_index,
    ),
    # The trained ViT-S/14 of a wheel, which is no DINOv2.
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch='dinov2-small',
        img_size=_base_.scale[::-1],
        patch_size=14,
        layer_scale_init_value=1e-5,
        out_type='featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/vit_small_focus.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(
        type='SETRUPHead',
        in_channels=384,
        channels=128,
        in_index=0,
        num_classes=11,
        num_convs=2,
        up_scale=2,
        kernel_size=3,
        dropout_ratio=0.0,
        norm_cfg=norm_cfg,
        align_corners=False,
        ignore_index=_base_.ignore_index,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=150, val_interval=150)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=dict(lr_mult=0.01),
            # Chosen on the frozen backbone.
            decode_head=dict(lr_mult=3.0),
        )
    ),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
    dict(type='CosineAnnealingLR', T_max=140, by_epoch=False, begin=10),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=50, save_optimizer=False, max_keep_ckpts=1),
)
