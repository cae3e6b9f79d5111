# EfficientNetV2-B0 with four experts in the stem, in all convolutions of the
# blocks but squeeze-and-excitation, and in the last 1x1.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='lors_plugin.DynamicModel',
        num_experts=4,
        routing='sigmoid_linear',
        module=dict(type='EfficientNetV2', arch='b0'),
        targets=[r'layers\.(?!.*\.se\.).*'],
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1280,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5),
    ),
)
