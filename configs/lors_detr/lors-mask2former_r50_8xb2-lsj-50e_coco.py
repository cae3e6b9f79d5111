# LORS in both stacks of Mask2Former: the six layers of the pixel decoder's
# encoder, and the nine of the transformer decoder.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'

# Lets other launchers than ours import the host without compiled operators.
custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='lors_plugin.CheckpointHook'))

# Offsets and attention weights start at zero in each layer: they stay private.
custom_hooks = [
    dict(
        type='lors_plugin.LORSHook',
        module='panoptic_head',
        targets=[
            r'pixel_decoder\.encoder\.layers\.(\d)\.self_attn\.value_proj',
            r'pixel_decoder\.encoder\.layers\.(\d)\.self_attn\.output_proj',
            r'transformer_decoder\.layers\.(\d)\.self_attn\.attn\.in_proj',
            r'transformer_decoder\.layers\.(\d)\.self_attn\.attn\.out_proj',
            r'transformer_decoder\.layers\.(\d)\.cross_attn\.attn\.in_proj',
            r'transformer_decoder\.layers\.(\d)\.cross_attn\.attn\.out_proj',
            r'(.*)\.layers\.(\d)\.ffn\.layers\.0\.0',
            r'(.*)\.layers\.(\d)\.ffn\.layers\.1',
        ],
        ranks=32,
    )
]
