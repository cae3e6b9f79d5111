# The norms of a frozen MobileNetV2.
_base_ = './lors-adamixer_mobilenetv2-bitfit_49-queries_bccd.py'

custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='lors_plugin.RepAdapterHook', method='norm'),
]
