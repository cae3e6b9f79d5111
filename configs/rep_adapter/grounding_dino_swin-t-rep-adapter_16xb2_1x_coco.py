# Grounding DINO with adapters in backbone, BERT, feature enhancer and decoder;
# all else is frozen.
_base_ = (
    'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py'
)

# With what Grounding DINO needs to run in onedl-mmdetection.
custom_imports = dict(
    imports=['lors_plugin.models'], allow_failed_imports=False
)

lang_model_name = 'checkpoints/bert-base-uncased'
model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    language_model=dict(name=lang_model_name),
    # Recomputing (num_cp=6) needs fairscale.
    encoder=dict(num_cp=0),
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        # Leave out any of 'backbone', 'language_model', 'encoder' (the feature
        # enhancer) and 'decoder'.
        exclude=[],
        hidden_dims=8,
        scale=1.0,
    )
]

# Adapters learn as they are published.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(_delete_=True)
)
