# Dropout as released; the classifier that mmpretrain has for MobileNetV3.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='lors_plugin.ParameterNet', arch='600m'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=1000,
        in_channels=1824,
        mid_channels=[1280],
        dropout_rate=0.2,
        act_cfg=dict(type='HSwish'),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
        topk=(1, 5),
    ),
)
