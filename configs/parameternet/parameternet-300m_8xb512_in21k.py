_base_ = './parameternet-600m_8xb512_in21k.py'

model = dict(backbone=dict(arch='300m'), head=dict(in_channels=1288))
