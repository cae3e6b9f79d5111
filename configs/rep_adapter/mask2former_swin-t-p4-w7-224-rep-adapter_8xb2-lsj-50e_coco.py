# Mask2Former, trained on COCO, with adapters in backbone, pixel decoder and
# decoder; queries and predictors are trained whole.
_base_ = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

model = dict(backbone=dict(drop_path_rate=0.0, init_cfg=None))

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        trainable=[
            r'panoptic_head\.(cls|mask|query|level)_embed',
            r'panoptic_head\.query_feat',
        ],
        hidden_dims=8,
        scale=1.0,
    )
]

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=10.0)))
)

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco_20220508_091649-01b0f990.pth'  # noqa: E501
