# ViT-B/16 with the weights of ImageNet-21k in the layout of MMPretrain.
# tools/model_converters/vit_npz.py makes the file from ViT-B_16.npz.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/vit-base-p16_in21k.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=768,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
