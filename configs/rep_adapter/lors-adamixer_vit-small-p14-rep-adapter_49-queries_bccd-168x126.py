# Adapters before attention and FFN of a frozen plain ViT; neck and decoder are
# trained. Another `method` of the hook needs no other config.
_base_ = './lors-adamixer_vit-small-p14-full_49-queries_bccd-168x126.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='lors_plugin.RepAdapterHook', method='rep_adapter'),
]

# What a method trains in the backbone learns as fast as the rest.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0)))
)
