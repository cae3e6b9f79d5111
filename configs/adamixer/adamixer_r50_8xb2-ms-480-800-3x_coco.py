_base_ = [
    '../_base_/models/adamixer_r50.py',
    '../_base_/datasets/coco_ms-480-800.py',
    '../_base_/schedules/adamixer_3x.py',
    '../_base_/default_runtime.py',
]

# Without crops the learning rate falls later.
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=36,
        by_epoch=True,
        milestones=[27, 33],
        gamma=0.1,
    ),
]
