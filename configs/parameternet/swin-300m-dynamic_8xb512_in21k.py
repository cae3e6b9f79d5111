_base_ = [
    '../_base_/models/swin-300m.py',
    '../_base_/datasets/parameternet_in21k.py',
    '../_base_/schedules/parameternet_in21k.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(head=dict(num_classes=21841))

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'.relative_position_bias_table': dict(decay_mult=0.0)}
    )
)

val_cfg = None
test_cfg = None
