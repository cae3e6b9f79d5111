model = dict(
    type='lors_plugin.AdaMixer',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(
        type='lors_plugin.SharedNormChannelMapping',
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
    ),
    query_generator=dict(
        type='lors_plugin.InitialQueryGenerator',
        num_queries=100,
        embed_dims=256,
    ),
    decoder=dict(
        type='lors_plugin.AdaMixerDecoder',
        num_classes=80,
        num_stages=6,
        embed_dims=256,
        strides=(4, 8, 16, 32),
        num_groups=4,
        in_points=32,
        out_points=128,
        num_heads=8,
        feedforward_channels=2048,
        loss_cls=dict(
            type='FocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=2.0,
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xyxy'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    # Detections of an image; as many as queries where nothing is given.
    test_cfg=dict(max_per_img=None),
)
