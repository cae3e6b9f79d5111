# All blocks share; with rank 8 they have a quarter of the weights.
_base_ = './deit-mini_fashion-mnist.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='lors_plugin.LORSStack',
        module=_base_.model.backbone,
        ranks=8,
        targets=[
            r'layers\.(\d+)\.attn\.qkv',
            r'layers\.(\d+)\.attn\.proj',
            r'layers\.(\d+)\.ffn\.layers\.0\.0',
            r'layers\.(\d+)\.ffn\.layers\.1',
        ],
    )
)
