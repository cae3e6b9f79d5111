# DINOv2, ViT-B/14.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        patch_size=14,
        layer_scale_init_value=1e-5,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://mmassets.onedl.ai/mmpretrain/v1.0/dinov2/vit-base-p14_dinov2-pre_3rdparty_20230426-ba246503.pth',  # noqa: E501
            prefix='backbone.',
        ),
    )
)
