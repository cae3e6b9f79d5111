# Swin-T at a token width of 24, with dynamic linear layers. ParameterNet gives
# neither heads nor drop path: the heads are Swin-T's; drop path is our choice.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='lors_plugin.DynamicSwinTransformer',
        num_experts=4,
        routing='softmax_mlp',
        arch=dict(
            embed_dims=24, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]
        ),
        drop_path_rate=0.1,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5),
    ),
)
