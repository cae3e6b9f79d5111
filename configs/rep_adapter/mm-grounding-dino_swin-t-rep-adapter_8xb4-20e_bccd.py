# MM-Grounding-DINO for classes of one's own: adapters are trained, all else is
# frozen, so without them it is the base model again. For other data change
# data_root, the names of the files and class_name.
_base_ = (
    'mmdet::mm_grounding_dino/grounding_dino_swin-t_finetune_8xb4_20e_cat.py'  # noqa: E501
)

# With what Grounding DINO needs to run in onedl-mmdetection.
custom_imports = dict(
    imports=['lors_plugin.models'], allow_failed_imports=False
)

lang_model_name = 'checkpoints/bert-base-uncased'

data_root = 'data/bccd/'
train_ann = 'annotations/instances_train.json'
val_ann = 'annotations/instances_val.json'
# As the annotations name them; the text encoder reads these words.
class_name = ('RBC', 'WBC', 'Platelets')
metainfo = dict(
    classes=class_name,
    palette=[(220, 20, 60), (60, 60, 220), (240, 200, 20)],
)

model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    language_model=dict(name=lang_model_name),
    # Recomputing (num_cp=6) needs fairscale.
    encoder=dict(num_cp=0),
    bbox_head=dict(num_classes=len(class_name)),
)

train_dataloader = dict(
    dataset=dict(data_root=data_root, ann_file=train_ann, metainfo=metainfo)
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, ann_file=val_ann, metainfo=metainfo)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_ann)
test_evaluator = val_evaluator

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='',
        # Leave out any of 'backbone', 'language_model', 'encoder' (the feature
        # enhancer) and 'decoder'.
        exclude=[],
        # Files of what was trained; the base is load_from.
        adapter_only=True,
        hidden_dims=24,
        scale=1.0,
    )
]

# Adapters learn as they are published.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(_delete_=True)
)
load_from = 'checkpoints/grounding_dino_swin-t_pretrain_obj365_goldg_grit9m_v3det_20231204_095047-b448804b.pth'  # noqa: E501
