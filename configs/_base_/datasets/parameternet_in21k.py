# ImageNet-22k by MMPretrain's name; nothing is validated while pretraining.
_base_ = './parameternet_in1k.py'

data_preprocessor = dict(num_classes=21841)

train_dataloader = dict(
    batch_size=512,
    dataset=dict(
        _delete_=True,
        type='ImageNet21k',
        data_root='data/imagenet21k',
        split='train',
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = None
val_evaluator = None
test_dataloader = None
test_evaluator = None
