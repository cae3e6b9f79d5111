# A hundred steps, twice 800 cells: as much as one CPU core does in a minute.
train_cfg = dict(by_epoch=False, max_iters=100, val_interval=25)
val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)

optim_wrapper = dict(
    type='lors_plugin.AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
    dict(type='CosineAnnealingLR', T_max=90, by_epoch=False, begin=10),
]
