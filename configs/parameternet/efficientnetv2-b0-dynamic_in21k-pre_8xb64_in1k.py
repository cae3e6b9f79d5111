# Fine-tuning of what efficientnetv2-b0-dynamic_8xb512_in21k.py gives; the
# layer of the classes starts anew.
_base_ = [
    '../_base_/models/efficientnetv2-dynamic.py',
    '../_base_/datasets/parameternet_finetune_in1k.py',
    '../_base_/schedules/parameternet_finetune.py',
    '../_base_/default_runtime_cls.py',
]

load_from = 'work_dirs/efficientnetv2-b0-dynamic_8xb512_in21k/epoch_90.pth'
