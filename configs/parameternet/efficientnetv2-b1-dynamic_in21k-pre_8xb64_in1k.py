_base_ = './efficientnetv2-b0-dynamic_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(module=dict(arch='b1')))

load_from = 'work_dirs/efficientnetv2-b1-dynamic_8xb512_in21k/epoch_90.pth'
