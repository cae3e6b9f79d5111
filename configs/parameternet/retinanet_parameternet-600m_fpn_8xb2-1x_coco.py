# A detector of MMDetection with ParameterNet in the place of its ResNet; the
# weights of ImageNet as in lors-adamixer_parameternet-600m_8xb2-1x_coco.py.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(
    epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
    checkpoint=dict(type='lors_plugin.CheckpointHook'),
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.ParameterNet',
        arch='600m',
        out_indices=(2, 4, 6, 8),
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/parameternet_600m.pth',
            prefix='backbone.',
        ),
    ),
    neck=dict(in_channels=[44, 76, 212, 304]),
)

val_evaluator = dict(type='lors_plugin.CocoMetric')
test_evaluator = dict(type='lors_plugin.CocoMetric')
