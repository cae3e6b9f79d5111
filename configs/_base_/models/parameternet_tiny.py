# GhostNet's rows, few of them, for grey images of 28 x 28 to 64 x 64 pixels.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='lors_plugin.ParameterNet',
        arch=dict(
            width=0.5,
            rows=[
                [(3, 48, 24, 0, 2)],
                [(5, 72, 40, 0.25, 2)],
                [(3, 120, 40, 0.25, 1)],
                [(3, 240, 80, 0.25, 1)],
            ],
        ),
        in_channels=1,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=10,
        in_channels=120,
        mid_channels=[128],
        dropout_rate=0.2,
        act_cfg=dict(type='HSwish'),
        loss=dict(type='CrossEntropyLoss'),
    ),
)
