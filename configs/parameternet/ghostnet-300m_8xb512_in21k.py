# The network without experts, to compare.
_base_ = './parameternet-300m_8xb512_in21k.py'

model = dict(backbone=dict(num_experts=1))
