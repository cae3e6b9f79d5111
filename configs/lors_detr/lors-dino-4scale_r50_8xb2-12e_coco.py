# LORS in encoder and decoder of DINO.
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/models/lors_deformable_transformer.py',
]

# Lets other launchers than ours import the host without compiled operators.
custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type='lors_plugin.CheckpointHook'))
