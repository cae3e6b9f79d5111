# Without experts, to compare.
_base_ = './swin-300m-dynamic_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(num_experts=1))

load_from = 'work_dirs/swin-300m_8xb512_in21k/epoch_90.pth'
