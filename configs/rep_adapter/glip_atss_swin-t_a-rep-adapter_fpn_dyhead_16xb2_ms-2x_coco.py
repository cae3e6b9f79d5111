# GLIP-T (A) with adapters in backbone and BERT; all else is frozen. The
# deformable convolutions of its head pad with zeros, so none go there.
_base_ = (
    'mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py'
)

custom_imports = dict(imports=['lors_plugin'], allow_failed_imports=False)

lang_model_name = 'checkpoints/bert-base-uncased'
model = dict(
    backbone=dict(drop_path_rate=0.0),
    language_model=dict(name=lang_model_name),
    bbox_head=dict(lang_model_name=lang_model_name),
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        hidden_dims=8,
        scale=1.0,
    )
]

# Adapters learn as they are published.
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=1e-4))
