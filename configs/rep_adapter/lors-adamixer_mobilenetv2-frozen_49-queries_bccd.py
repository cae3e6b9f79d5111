# The backbone stays as it came from ImageNet; neck and decoder are trained.
_base_ = '../lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='lors_plugin.FreezeHook', modules=['backbone']),
]
