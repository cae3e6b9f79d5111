# CLIP's image encoder as MMPretrain has it: tuned on ImageNet-1k afterwards.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        pre_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/clip/clip-vit-base-p16_openai-pre_3rdparty_in1k_20221220-c7d9c899.pth',  # noqa: E501
            prefix='backbone.',
        ),
    )
)
