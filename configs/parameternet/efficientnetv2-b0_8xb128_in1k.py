# The network without experts, to compare.
_base_ = './efficientnetv2-b0-dynamic_8xb128_in1k.py'

model = dict(backbone=dict(_delete_=True, type='EfficientNetV2', arch='b0'))

custom_hooks = []
