# GhostNet 1.0, of which there are released weights: ReLU, one kernel.
_base_ = './ghostnet-600m_8xb128_in1k.py'

act_cfg = dict(type='ReLU')

model = dict(
    backbone=dict(arch='ghostnet-1.0', act_cfg=act_cfg),
    head=dict(in_channels=960, act_cfg=act_cfg),
)
