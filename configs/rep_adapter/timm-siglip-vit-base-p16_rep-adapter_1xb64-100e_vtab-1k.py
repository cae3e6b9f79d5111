# SigLIP's image encoder, ViT-B/16, by MMPretrain's wrapper of timm, which
# downloads the weights. Any other name of timm works, if its blocks do.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    _delete_=True,
    type='TimmClassifier',
    model_name='vit_base_patch16_siglip_224',
    pretrained=True,
    num_classes=100,
)

custom_hooks = [
    dict(
        type='lors_plugin.RepAdapterHook',
        module='model',
        trainable=['head'],
        hidden_dims=8,
        scale=1.0,
    )
]
