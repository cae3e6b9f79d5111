# LORS in encoder and decoder of Deformable DETR.
_base_ = [
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    '../_base_/models/lors_deformable_transformer.py',
]

# Lets other launchers than ours import the host without compiled operators.
custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='lors_plugin.CheckpointHook'))
