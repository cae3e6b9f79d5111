# 1 to 16 images a class: more augmentation, as published. Here Food-101 with
# 16; tools/dataset_converters/image_lists.py --shots draws the lists.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

data_root = 'data/few_shot/food101/'
num_classes = 101

model = dict(
    head=dict(
        num_classes=num_classes,
        loss=dict(
            _delete_=True,
            type='LabelSmoothLoss',
            label_smooth_val=0.1,
            mode='original',
        ),
    ),
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)

data_preprocessor = dict(num_classes=num_classes)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop',
        scale=224,
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
    ),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    # One image of each of few classes is less than a batch.
    drop_last=False,
    dataset=dict(
        data_root=data_root,
        ann_file='train_16-shot_seed0.txt',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, ann_file='val_seed0.txt')
)
test_dataloader = dict(dataset=dict(data_root=data_root))
