_base_ = [
    '../_base_/models/parameternet_600m.py',
    '../_base_/datasets/parameternet_in1k.py',
    '../_base_/schedules/parameternet_in1k.py',
    '../_base_/default_runtime_cls.py',
]

# Notices when all images get the same kernel or one expert is left.
custom_hooks = [dict(type='lors_plugin.ExpertUsageHook', show_table=False)]
