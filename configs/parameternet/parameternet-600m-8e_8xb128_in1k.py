# The paper's table 4: the number of experts.
_base_ = './parameternet-600m_8xb128_in1k.py'

model = dict(backbone=dict(num_experts=8))
