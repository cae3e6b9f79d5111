# Only the decoder is trained.
_base_ = './setr_vit-small-p14-full_camvid-168x126.py'

custom_hooks = [dict(type='lors_plugin.FreezeHook', modules=['backbone'])]
