# FSDP: gradients and the optimizer's state are shared out among the GPUs.
_base_ = '../lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    # Checkpoints as the plain runner writes them.
    state_dict_cfg='full',
)
# Clips by the norm over all shards.
optim_wrapper = dict(type='lors_plugin.ShardedOptimWrapper')
