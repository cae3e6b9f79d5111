# The network without experts, to compare.
_base_ = './efficientnetv2-b1-dynamic_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(_delete_=True, type='EfficientNetV2', arch='b1'))

load_from = 'work_dirs/efficientnetv2-b1_8xb512_in21k/epoch_90.pth'
