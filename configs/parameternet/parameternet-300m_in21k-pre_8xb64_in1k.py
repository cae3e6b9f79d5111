_base_ = './parameternet-600m_in21k-pre_8xb64_in1k.py'

model = dict(backbone=dict(arch='300m'), head=dict(in_channels=1288))

load_from = 'work_dirs/parameternet-300m_8xb512_in21k/epoch_90.pth'
