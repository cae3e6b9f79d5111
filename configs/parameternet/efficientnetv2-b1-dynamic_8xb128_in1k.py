_base_ = './efficientnetv2-b0-dynamic_8xb128_in1k.py'

model = dict(backbone=dict(module=dict(arch='b1')))
