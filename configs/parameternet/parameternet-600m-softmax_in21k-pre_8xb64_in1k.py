# The routing of the paper instead of the released program's.
_base_ = './parameternet-600m_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(routing='softmax_mlp'))

load_from = 'work_dirs/parameternet-600m-softmax_8xb512_in21k/epoch_90.pth'
