# Fine-tuning of what swin-300m-dynamic_8xb512_in21k.py gives; the layer of the
# classes starts anew.
_base_ = [
    '../_base_/models/swin-300m.py',
    '../_base_/datasets/parameternet_finetune_in1k.py',
    '../_base_/schedules/parameternet_finetune.py',
    '../_base_/default_runtime_cls.py',
]

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'.relative_position_bias_table': dict(decay_mult=0.0)}
    )
)

load_from = 'work_dirs/swin-300m-dynamic_8xb512_in21k/epoch_90.pth'
