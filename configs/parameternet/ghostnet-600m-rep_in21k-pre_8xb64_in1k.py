# Three branches beside each convolution while training.
_base_ = './ghostnet-600m_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(conv='rep', num_branches=3))

load_from = 'work_dirs/ghostnet-600m-rep_8xb512_in21k/epoch_90.pth'
