# ConvNeXt-B of ImageNet-21k, with adapters before the first pointwise layer of
# every block: the depth-wise convolution before it could not swallow one.
_base_ = './vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeXt',
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/convnext/convnext-base_3rdparty_in21k_20220124-13b83eec.pth',  # noqa: E501
            prefix='backbone.',
        ),
    ),
    head=dict(in_channels=1024),
)
