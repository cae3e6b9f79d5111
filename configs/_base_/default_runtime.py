_base_ = 'mmdet::_base_/default_runtime.py'

# A resumed training goes on exactly as if it had not stopped.
default_hooks = dict(epoch_seed=dict(type='lors_plugin.EpochSeedHook'))
