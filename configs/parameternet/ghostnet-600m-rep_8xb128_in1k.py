# Three branches beside each convolution while training, merged for inference
# (lors_plugin.reparam): the alternative of the paper.
_base_ = './ghostnet-600m_8xb128_in1k.py'

model = dict(backbone=dict(conv='rep', num_branches=3))
