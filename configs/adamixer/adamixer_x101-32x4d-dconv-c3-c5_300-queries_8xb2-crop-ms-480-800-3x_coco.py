# Needs mmcv with compiled operators.
_base_ = './adamixer_r50_300-queries_8xb2-crop-ms-480-800-3x_coco.py'

model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        # The paper says no more than "DCN"; for its second version write
        # type='DCNv2'.
        dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        init_cfg=dict(
            type='Pretrained', checkpoint='open-mmlab://resnext101_32x4d'
        ),
    )
)
