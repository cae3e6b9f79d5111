# The network without experts, to compare.
_base_ = './parameternet-300m_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(num_experts=1))

load_from = 'work_dirs/ghostnet-300m_8xb512_in21k/epoch_90.pth'
