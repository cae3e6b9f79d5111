# LORS in encoder and decoder of Deformable DETR: six layers share the weights
# of their attentions and FFNs.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'

# Lets other launchers than ours import the host without compiled operators.
custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='lors_plugin.CheckpointHook'))

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
