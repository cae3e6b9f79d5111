_base_ = [
    '../_base_/models/efficientnetv2-dynamic.py',
    '../_base_/datasets/parameternet_in21k.py',
    '../_base_/schedules/parameternet_in21k.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(head=dict(num_classes=21841))

val_cfg = None
test_cfg = None
