# RandAugment and random erasing are published; their strengths, those of
# MMPretrain's Swin, and bicubic resizing are our choice.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
