# Only the classifier is trained.
_base_ = './vit-base-p16_full_1xb64-100e_vtab-1k.py'

optim_wrapper = dict(optimizer=dict(lr=1e-3))

custom_hooks = [dict(type='lors_plugin.FreezeHook', modules=['backbone'])]
