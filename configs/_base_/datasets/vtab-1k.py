# One task of VTAB-1k, as its usual archive has it: lists of `file label`, 800
# images to train on and 200 to choose by. This is CIFAR-100; for another task
# change data_root of the three loaders, and num_classes here and in the head.
dataset_type = 'CustomDataset'
data_root = 'data/vtab-1k/cifar/'
data_preprocessor = dict(
    num_classes=100,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

# No augmentation, as published.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='Resize',
        scale=(224, 224),
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='PackInputs'),
]
test_pipeline = train_pipeline

train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='train800.txt',
        pipeline=train_pipeline,
    ),
)
# Scales and epochs are chosen on these images and never on the test set. The
# published figures train on all thousand: ann_file='train800val200.txt'.
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='val200.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='test.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)

val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
