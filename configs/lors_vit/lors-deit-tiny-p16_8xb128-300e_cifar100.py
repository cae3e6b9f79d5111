# LORS, section 4.3: the weights of all twelve blocks in half the parameters.
_base_ = './deit-tiny-p16_8xb128-300e_cifar100.py'

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
