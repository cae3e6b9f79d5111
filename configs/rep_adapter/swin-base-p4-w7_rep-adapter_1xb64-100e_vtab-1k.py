# Adapters before attention and FFN of every block of Swin-B. The weights are
# those of ImageNet-21k, tuned on ImageNet-1k afterwards.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch='base',
        img_size=224,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/swin_base_patch4_window7_224_22kto1k-f967f799.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=1024),
)
