# The small set of docs/en/benchmarks/parameternet_evidence.md.
_base_ = [
    '../_base_/models/parameternet_tiny.py',
    '../_base_/datasets/elpv.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(head=dict(num_classes=2))
data_preprocessor = dict(
    _delete_=True, num_classes=2, mean=[151.45], std=[38.83]
)

load = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    dict(type='Resize', scale=(32, 32), interpolation='area'),
]
# A cell has no up and no left.
flip = dict(
    type='RandomFlip',
    prob=[0.25, 0.25, 0.25],
    direction=['horizontal', 'vertical', 'diagonal'],
)
pack = dict(type='PackInputs')
train_dataloader = dict(
    batch_size=32, dataset=dict(pipeline=[*load, flip, pack])
)
val_dataloader = dict(dataset=dict(pipeline=[*load, pack]))
test_dataloader = dict(dataset=dict(pipeline=[*load, pack]))

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
)
param_scheduler = [
    # A tenth of the steps.
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=12,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=1)
val_cfg = dict()
test_cfg = dict()
