# A plain ViT with ViTDet's neck under LORS-AdaMixer. All weights are trained;
# the other ways to adapt it begin here.
_base_ = '../lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

custom_imports = dict(
    imports=['lors_plugin', 'mmpretrain.models'], allow_failed_imports=False
)

model = dict(
    # Whole cells of the coarsest level.
    data_preprocessor=dict(pad_size_divisor=28),
    # The trained ViT-S/14 of a wheel, which is no DINOv2.
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='dinov2-small',
        img_size=(140, 168),
        patch_size=14,
        layer_scale_init_value=1e-5,
        out_type='featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/vit_small_focus.pth',
            prefix='backbone.',
        ),
    ),
    neck=[
        dict(
            type='lors_plugin.SimpleFeaturePyramid',
            in_channels=384,
            out_channels=64,
            scales=(2, 1, 0.5),
        ),
        # One norm for all levels lets the decoder blend them.
        dict(
            type='lors_plugin.SharedNormChannelMapping',
            in_channels=[64, 64, 64],
            out_channels=64,
        ),
    ],
    decoder=dict(strides=(7, 14, 28)),
)

# Small enough for two CPU cores: 12x10 patches.
scale = (168, 126)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.01)))
)
