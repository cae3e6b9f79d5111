# The baseline: DeiT-Tiny as its host trains it, on CIFAR-100.
_base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'

# Lets other launchers than ours import the host without compiled operators.
custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(
        type='lors_plugin.CheckpointHook', max_keep_ckpts=2, save_best='auto'
    ),
    epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
)

model = dict(head=dict(num_classes=100))

data_preprocessor = dict(
    num_classes=100,
    mean=[129.304, 124.070, 112.434],
    std=[68.170, 65.392, 70.418],
    # Images of CIFAR are RGB already.
    to_rgb=False,
)
resize = dict(
    type='Resize', scale=224, backend='pillow', interpolation='bicubic'
)
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type='CIFAR100',
        data_root='data/cifar100',
        split='train',
        pipeline=[
            dict(type='RandomCrop', crop_size=32, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            resize,
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type='CIFAR100',
        data_root='data/cifar100',
        split='test',
        pipeline=[resize, dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader

# AdamW, 1e-3 at a batch of 1024, decay 0.05 and a cosine after 20 epochs of
# warm-up are the host's.
