# The routing of the paper instead of the released program's.
_base_ = './parameternet-600m_8xb512_in21k.py'

model = dict(backbone=dict(routing='softmax_mlp'))
