# LORS, section 4.3, at the size of images of the released program.
_base_ = './deit-tiny-p4-32px_8xb128-300e_cifar100.py'

attn_groups = [1] * 9 + [2, 4, 6]
ffn_groups = [6, 4, 2] + [1] * 9

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.LORSStack',
        module=_base_.model.backbone,
        ranks=32,
        targets=[
            dict(pattern=r'layers\.(\d+)\.attn\.qkv', groups=attn_groups),
            dict(pattern=r'layers\.(\d+)\.attn\.proj', groups=attn_groups),
            dict(
                pattern=r'layers\.(\d+)\.ffn\.layers\.0\.0', groups=ffn_groups
            ),
            dict(pattern=r'layers\.(\d+)\.ffn\.layers\.1', groups=ffn_groups),
        ],
    )
)
