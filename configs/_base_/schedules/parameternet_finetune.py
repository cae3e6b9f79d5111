# Published: 30 epochs, no warm-up, batch 512, 5e-4, decay 1e-8. AdamW and the
# cosine are taken to be those of the pretraining.
_base_ = './parameternet_in1k.py'

optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=1e-8))

param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=30,
        convert_to_iter_based=True,
    )
]

train_cfg = dict(max_epochs=30)

auto_scale_lr = dict(base_batch_size=512)
