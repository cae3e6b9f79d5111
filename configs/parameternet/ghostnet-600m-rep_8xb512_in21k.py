# Three branches beside each convolution while training.
_base_ = './ghostnet-600m_8xb512_in21k.py'

model = dict(backbone=dict(conv='rep', num_branches=3))
