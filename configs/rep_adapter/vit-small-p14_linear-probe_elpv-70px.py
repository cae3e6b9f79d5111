# Only the classifier is trained.
_base_ = './vit-small-p14_full_elpv-70px.py'

custom_hooks = [dict(type='lors_plugin.FreezeHook', modules=['backbone'])]

optim_wrapper = dict(optimizer=dict(lr=1e-2))
