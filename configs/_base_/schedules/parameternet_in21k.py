# Published: 90 epochs, 5 of warm-up, batch 4096, AdamW, 4e-3.
_base_ = './parameternet_in1k.py'

optim_wrapper = dict(optimizer=dict(lr=4e-3))

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=True,
        begin=5,
        end=90,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(max_epochs=90)

auto_scale_lr = dict(base_batch_size=4096)
