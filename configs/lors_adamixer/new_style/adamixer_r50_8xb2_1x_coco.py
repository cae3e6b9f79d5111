# AdaMixer R50 in MMEngine's new style: types are classes, so that an editor
# finds them. The same as ../../adamixer/adamixer_r50_8xb2-1x_coco.py.
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import AspectRatioBatchSampler, CocoDataset
from mmdet.datasets.transforms import (
    LoadAnnotations,
    PackDetInputs,
    RandomFlip,
    Resize,
)
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.models import (
    DetDataPreprocessor,
    FocalLoss,
    GIoULoss,
    L1Loss,
    ResNet,
)
from mmdet.models.task_modules import (
    BBoxL1Cost,
    FocalLossCost,
    HungarianAssigner,
    IoUCost,
)
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.model import PretrainedInit
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper
from mmengine.runner import (
    EpochBasedTrainLoop,
    LogProcessor,
    TestLoop,
    ValLoop,
)
from mmengine.visualization import LocalVisBackend
from torch.nn import BatchNorm2d
from torch.optim import AdamW

from lors_plugin.adamixer import (
    AdaMixer,
    AdaMixerDecoder,
    InitialQueryGenerator,
    SharedNormChannelMapping,
)
from lors_plugin.engine.hooks import CheckpointHook, EpochSeedHook
from lors_plugin.evaluation import CocoMetric

default_scope = 'mmdet'

model = dict(
    type=AdaMixer,
    data_preprocessor=dict(
        type=DetDataPreprocessor,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type=ResNet,
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type=BatchNorm2d, requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(
            type=PretrainedInit, checkpoint='torchvision://resnet50'
        ),
    ),
    neck=dict(
        type=SharedNormChannelMapping,
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
    ),
    query_generator=dict(
        type=InitialQueryGenerator, num_queries=100, embed_dims=256
    ),
    decoder=dict(
        type=AdaMixerDecoder,
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
            type=FocalLoss,
            use_sigmoid=True,
            gamma=2.0,
            alpha=0.25,
            loss_weight=2.0,
        ),
        loss_bbox=dict(type=L1Loss, loss_weight=5.0),
        loss_iou=dict(type=GIoULoss, loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type=HungarianAssigner,
            match_costs=[
                dict(type=FocalLossCost, weight=2.0),
                dict(type=BBoxL1Cost, weight=5.0, box_format='xyxy'),
                dict(type=IoUCost, iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=None),
)

data_root = 'data/coco/'
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type=DefaultSampler, shuffle=True),
    batch_sampler=dict(type=AspectRatioBatchSampler),
    dataset=dict(
        type=CocoDataset,
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(1333, 800), keep_ratio=True),
            dict(type=RandomFlip, prob=0.5),
            dict(type=PackDetInputs),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset,
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=Resize, scale=(1333, 800), keep_ratio=True),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(
                type=PackDetInputs,
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type=CocoMetric,
    ann_file=data_root + 'annotations/instances_val2017.json',
    metric='bbox',
    format_only=False,
)
test_evaluator = val_evaluator

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=12, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type=MultiStepLR,
        begin=0,
        end=12,
        by_epoch=True,
        milestones=[8, 11],
        gamma=0.1,
    ),
]
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=2.5e-5, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook),
    # A resumed training goes on exactly as if it had not stopped.
    epoch_seed=dict(type=EpochSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type=DetLocalVisualizer,
    name='visualizer',
    vis_backends=[dict(type=LocalVisBackend)],
)
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
