# The network without experts, to compare.
_base_ = './efficientnetv2-b0-dynamic_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(_delete_=True, type='EfficientNetV2', arch='b0'))

load_from = 'work_dirs/efficientnetv2-b0_8xb512_in21k/epoch_90.pth'
