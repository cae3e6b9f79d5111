# Without experts, to compare.
_base_ = './swin-300m-dynamic_8xb128_in1k.py'

model = dict(backbone=dict(num_experts=1))

custom_hooks = []
