# All weights are trained. The other ways to adapt this model begin here.
_base_ = [
    '../_base_/models/vit-small-p14_focus.py',
    '../_base_/datasets/elpv.py',
    '../_base_/schedules/elpv.py',
    '../_base_/default_runtime_cls.py',
]

default_hooks = dict(
    logger=dict(interval=10),
    # Only the weights that are best on the validation cells.
    checkpoint=dict(
        by_epoch=False,
        interval=-1,
        save_best='accuracy/top1',
        save_last=False,
        save_optimizer=False,
    ),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4))
