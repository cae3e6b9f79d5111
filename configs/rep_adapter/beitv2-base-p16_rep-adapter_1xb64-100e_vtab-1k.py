# BEiT v2, ViT-B/16, tuned on ImageNet-21k and ImageNet-1k afterwards.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='BEiTViT',
        arch='base',
        img_size=224,
        patch_size=16,
        out_type='avg_featmap',
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        use_shared_rel_pos_bias=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://mmassets.onedl.ai/mmclassification/v0/beit/beitv2-base_3rdparty_in1k_20221114-73e11905.pth',  # noqa: E501
            prefix='backbone.',
        ),
    )
)
