# Fine-tuning of what parameternet-600m_8xb512_in21k.py gives; the layer of
# the classes starts anew.
_base_ = [
    '../_base_/models/parameternet_600m.py',
    '../_base_/datasets/parameternet_finetune_in1k.py',
    '../_base_/schedules/parameternet_finetune.py',
    '../_base_/default_runtime_cls.py',
]

load_from = 'work_dirs/parameternet-600m_8xb512_in21k/epoch_90.pth'
