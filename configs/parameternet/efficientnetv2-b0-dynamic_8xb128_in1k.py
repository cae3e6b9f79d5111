_base_ = [
    '../_base_/models/efficientnetv2-dynamic.py',
    '../_base_/datasets/parameternet_in1k.py',
    '../_base_/schedules/parameternet_in1k.py',
    '../_base_/default_runtime_cls.py',
]

custom_hooks = [dict(type='lors_plugin.ExpertUsageHook', show_table=False)]
