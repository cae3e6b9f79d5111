_base_ = 'mmpretrain::_base_/default_runtime.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

default_hooks = dict(
    # A resumed training goes on exactly as if it had not stopped.
    epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
    # Neither a kill nor a full disk loses a run.
    checkpoint=dict(type='lors_plugin.CheckpointHook', max_keep_ckpts=3),
)
