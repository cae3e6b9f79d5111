# DINO, trained on COCO, with adapters in backbone, encoder and decoder; whole
# are trained what depends on the classes, and the boxes.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

# The hook freezes the stages that the host would freeze with their adapters.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        trainable=['bbox_head', 'dn_query_generator'],
        hidden_dims=8,
        scale=1.0,
    )
]

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=10.0)))
)

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-4scale_r50_8xb2-12e_coco/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth'  # noqa: E501
