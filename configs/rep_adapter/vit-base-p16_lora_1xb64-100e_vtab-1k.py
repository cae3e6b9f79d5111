# MMPretrain's LoRA in the attention, and the classifier.
_base_ = './vit-base-p16_full_1xb64-100e_vtab-1k.py'

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
