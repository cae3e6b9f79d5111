# DeepSpeed, ZeRO stage 2: as FSDP shares out gradients and optimizer.
_base_ = '../lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    zero_optimization=dict(stage=2),
    gradient_clipping=_base_.optim_wrapper.clip_grad.max_norm,
)
optim_wrapper = dict(
    _delete_=True,
    type='DeepSpeedOptimWrapper',
    optimizer=_base_.optim_wrapper.optimizer,
)

# DeepSpeed writes directories, which only MMEngine's hook knows.
default_hooks = dict(checkpoint=dict(type='mmengine.CheckpointHook'))
