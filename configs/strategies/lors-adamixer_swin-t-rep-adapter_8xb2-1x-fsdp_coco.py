# FSDP with a frozen backbone and adapters in it. No hook can adapt a model
# that is sharded already, so `model` describes it.
_base_ = (
    '../rep_adapter/lors-adamixer_swin-t-p4-w7-rep-adapter_8xb2-1x_coco.py'  # noqa: E501
)

runner_type = 'FlexibleRunner'
strategy = dict(type='FSDPStrategy', state_dict_cfg='full')
optim_wrapper = dict(type='lors_plugin.ShardedOptimWrapper')

model = dict(
    backbone={
        **_base_.custom_hooks[0],
        '_delete_': True,
        'type': 'lors_plugin.AdaptedModel',
        'module': _base_.model.backbone,
    }
)
custom_hooks = []
