_base_ = [
    '../_base_/models/swin-300m.py',
    '../_base_/datasets/parameternet_in1k.py',
    '../_base_/schedules/parameternet_in1k.py',
    '../_base_/default_runtime_cls.py',
]

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'.relative_position_bias_table': dict(decay_mult=0.0)}
    )
)

custom_hooks = [dict(type='lors_plugin.ExpertUsageHook', show_table=False)]
