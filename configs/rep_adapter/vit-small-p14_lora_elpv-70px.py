# MMPretrain's LoRA in the attention, and the classifier.
_base_ = './vit-small-p14_full_elpv-70px.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='LoRAModel',
        module=_base_.model.backbone,
        alpha=8,
        rank=8,
        targets=[dict(type='.*attn.qkv')],
    )
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))
