# A frozen Swin-T with adapters; neck and decoder are trained as a whole.
_base_ = '../lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.0,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
        # The weights are in the layout of Swin's own program.
        convert_weights=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',  # noqa: E501
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        placement='block',
        hidden_dims=8,
        scale=1.0,
        # The norms of the outputs are of no classifier and begin untrained.
        trainable=[r'norm\d'],
    )
]

# As for all of AdaMixer's Swin models; adapters learn as they are published.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            rep_adapter=dict(lr_mult=40.0),
            norm=dict(decay_mult=0.0),
        )
    )
)
