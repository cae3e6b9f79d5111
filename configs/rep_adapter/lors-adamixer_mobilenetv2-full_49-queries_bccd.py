# All of the backbone is trained (with a fifth of the learning rate).
_base_ = '../lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

model = dict(backbone=dict(frozen_stages=-1))
