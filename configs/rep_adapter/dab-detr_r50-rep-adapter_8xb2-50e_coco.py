# DAB-DETR, trained on COCO, with adapters in backbone, encoder and decoder;
# the head is trained whole.
_base_ = 'mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

# The hook freezes the stages that the host would freeze with their adapters.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        trainable=['bbox_head'],
        hidden_dims=8,
        scale=1.0,
    )
]

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=10.0)))
)

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dab_detr/dab-detr_r50_8xb2-50e_coco/dab-detr_r50_8xb2-50e_coco_20221122_120837-c1035c8c.pth'  # noqa: E501
