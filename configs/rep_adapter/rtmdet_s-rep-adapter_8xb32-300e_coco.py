# RTMDet-s on a frozen CSPNeXt with adapters before its pointwise convolutions;
# neck and head are trained.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='lors_plugin.RepAdapterHook',
        hidden_dims=8,
        scale=1.0,
    ),
]
