# Six layers of encoder and decoder share the weights of their attentions and
# FFNs; names are those of Deformable DETR and DINO.
#
# Offsets and attention weights start at zero in each layer: they stay private.
custom_hooks = [
    dict(
        type='lors_plugin.LORSHook',
        targets=[
            r'encoder\.layers\.(\d)\.self_attn\.value_proj',
            r'encoder\.layers\.(\d)\.self_attn\.output_proj',
            r'decoder\.layers\.(\d)\.self_attn\.attn\.in_proj',
            r'decoder\.layers\.(\d)\.self_attn\.attn\.out_proj',
            r'decoder\.layers\.(\d)\.cross_attn\.value_proj',
            r'decoder\.layers\.(\d)\.cross_attn\.output_proj',
            r'(encoder|decoder)\.layers\.(\d)\.ffn\.layers\.0\.0',
            r'(encoder|decoder)\.layers\.(\d)\.ffn\.layers\.1',
        ],
        ranks=32,
    )
]
