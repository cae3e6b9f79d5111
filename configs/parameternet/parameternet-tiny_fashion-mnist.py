# A few minutes on a CPU; the model of
# docs/en/benchmarks/parameternet_evidence.md.
_base_ = [
    '../_base_/models/parameternet_tiny.py',
    '../_base_/datasets/fashion_mnist.py',
    '../_base_/default_runtime_cls.py',
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=2,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_cfg = dict()

custom_hooks = [dict(type='lors_plugin.ExpertUsageHook')]
