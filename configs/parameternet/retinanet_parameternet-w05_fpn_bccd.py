# RetinaNet of MMDetection, narrow, and without pretrained weights, see
# lors-adamixer_parameternet-w05_49-queries_bccd.py.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/bccd.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.ParameterNet',
        arch='600m',
        width=0.5,
        out_indices=(2, 4, 6, 8),
    ),
    neck=dict(in_channels=[12, 20, 56, 80], out_channels=64),
    bbox_head=dict(
        num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2
    ),
)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=6, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
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
