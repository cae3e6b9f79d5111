# DeiT-Tiny as the program that the authors of LORS released trains it: images
# are not enlarged, and there are 64 patches of 4 x 4 pixels instead of 196.
_base_ = './deit-tiny-p16_8xb128-300e_cifar100.py'

# Position embeddings are those of 56 x 56 pixels, interpolated to the image.
model = dict(backbone=dict(img_size=56, patch_size=4))

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ]
    )
)
val_dataloader = dict(dataset=dict(pipeline=[dict(type='PackInputs')]))
test_dataloader = val_dataloader
