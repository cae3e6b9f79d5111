# EVA-02, ViT-B/14, by masked images of ImageNet-21k.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ViTEVA02',
        arch='b',
        img_size=224,
        patch_size=14,
        sub_ln=True,
        final_norm=False,
        out_type='avg_featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://mmassets.onedl.ai/mmpretrain/v1.0/eva02/eva02-base-p14_pre_in21k_20230505-2f2d4d3c.pth',  # noqa: E501
            prefix='backbone.',
        ),
    )
)
