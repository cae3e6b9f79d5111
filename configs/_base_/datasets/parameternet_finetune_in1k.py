# As for training from scratch, but without random erasing.
_base_ = './parameternet_in1k.py'

train_pipeline = [
    step for step in _base_.train_pipeline if step.type != 'RandomErasing'
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
