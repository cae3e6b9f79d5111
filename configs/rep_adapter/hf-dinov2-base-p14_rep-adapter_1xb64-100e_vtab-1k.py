# DINOv2, ViT-B/14, by MMPretrain's wrapper of Hugging Face. model_name is a
# name of the Hub or a folder of its files.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    _delete_=True,
    type='HuggingFaceClassifier',
    model_name='checkpoints/dinov2-base',
    pretrained=True,
    num_labels=100,
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='model',
        trainable=['classifier'],
        hidden_dims=8,
        scale=1.0,
    )
]
