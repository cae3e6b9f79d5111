# All weights are trained; the other ways to adapt this model begin here.
_base_ = [
    '../_base_/models/vit-base-p16_in21k.py',
    '../_base_/datasets/vtab-1k.py',
    '../_base_/schedules/rep-adapter_100e.py',
    '../_base_/default_runtime_cls.py',
]

# Smaller than the adapters': all weights move. Our choice.
optim_wrapper = dict(optimizer=dict(lr=1e-4))
