# Without experts, to compare.
_base_ = './swin-300m-dynamic_8xb512_in21k.py'

model = dict(backbone=dict(num_experts=1))
