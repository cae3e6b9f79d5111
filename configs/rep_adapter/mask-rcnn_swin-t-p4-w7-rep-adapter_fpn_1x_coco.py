# Mask R-CNN on a frozen Swin-T with adapters; neck and heads are trained.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

model = dict(backbone=dict(drop_path_rate=0.0))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        # The norms of the outputs are of no classifier and begin untrained.
        trainable=[r'norm\d'],
        hidden_dims=8,
        scale=1.0,
    )
]

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=10.0)))
)
