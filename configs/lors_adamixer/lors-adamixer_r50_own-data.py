# For data of your own: copy this file beside itself and edit the copy.
# docs/en/user_guides/own_data.md goes through it.
_base_ = [
    '../_base_/models/lors-adamixer_r50.py',
    '../_base_/default_runtime.py',
]

# 1. The data. Names of classes as in the json files, in their order; a single
# one with a comma: ('cat',). The paths below start from data_root.
data_root = 'data/my_data/'
classes = ('cat', 'dog')
train_ann, train_images = 'train.json', 'images/'
val_ann, val_images = 'val.json', 'images/'

# 2. The longer and the shorter side of images in the network; images are
# resized to fit, and keep their aspect ratio. Half the size: four times
# faster.
image_size = (1333, 800)

# 3. The training. The learning rate is that of 16 images a step;
# `tools/train.py --auto-scale-lr` adapts it to yours.
max_epochs = 12
batch_size = 2  # a GPU
num_workers = 2  # processes that read images
lr = 2.5e-5
load_from = None  # a checkpoint to start from; other classes do not matter

# 4. The model. Most edits stop here.
model = dict(
    # Stages of the backbone that are not trained: 1 to 4, or -1 for none.
    backbone=dict(frozen_stages=1),
    # More than the objects of any image.
    query_generator=dict(num_queries=100),
    # Computed, against the habit of configs, so that `classes` is the only
    # place that knows the number.
    decoder=dict(num_classes=len(classes), num_stages=6),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomResize',
        scale=image_size,
        ratio_range=(0.8, 1.0),
        keep_ratio=True,
    ),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
        ),
    ),
]

metainfo = dict(classes=classes)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file=train_ann,
        data_prefix=dict(img=train_images),
        # Images without objects teach what is none.
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file=val_ann,
        data_prefix=dict(img=val_images),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='lors_plugin.CocoMetric',
    ann_file=data_root + val_ann,
    metric='bbox',
)
test_evaluator = val_evaluator

train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=lr, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
auto_scale_lr = dict(base_batch_size=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
# The newest checkpoint and the best one are kept.
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'),
)
