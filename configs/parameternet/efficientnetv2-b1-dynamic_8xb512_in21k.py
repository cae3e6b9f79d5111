_base_ = './efficientnetv2-b0-dynamic_8xb512_in21k.py'

model = dict(backbone=dict(module=dict(arch='b1')))
