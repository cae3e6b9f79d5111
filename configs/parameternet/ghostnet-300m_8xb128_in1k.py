# The network without experts, to compare.
_base_ = './parameternet-300m_8xb128_in1k.py'

model = dict(backbone=dict(num_experts=1))

custom_hooks = []
