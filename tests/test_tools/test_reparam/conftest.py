"""Small models that merge, and files of them, for tests of the tool."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from lors_plugin.adapters import adapter_checkpoint
from lors_plugin.reparam.structure import (
    adapt,
    asks_for_adapters,
    build_base,
)

ARCH = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
VIT = dict(
    type='VisionTransformer', img_size=32, patch_size=16, arch=ARCH,
    init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'),
)  # fmt: skip
SWIN = dict(
    type='SwinTransformer', embed_dims=24, depths=(2, 2), num_heads=(2, 4),
    strides=(4, 2), out_indices=(0, 1), window_size=4,
)  # fmt: skip


def classifier(backbone, channels=24, pool=True, hook=(), head='Linear'):
    """A classifier with adapters."""
    neck = dict(type='GlobalAveragePooling')
    return dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=neck if pool else None,
            head=dict(
                type=f'{head}ClsHead',
                num_classes=3,
                in_channels=channels,
            ),
            data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3),
        ),
        load_from='nowhere.pth',
        custom_hooks=[
            dict(type='lors_plugin.RepAdapterHook', **dict(hook)),
            dict(type='EMAHook', momentum=0.001),
        ],
        optim_wrapper=dict(
            type='lors_plugin.AutocastOptimWrapper',
            optimizer=dict(type='SGD', lr=0.1),
            paramwise_cfg=dict(custom_keys=dict(rep_adapter=dict(lr_mult=9))),
        ),
    )


def detector(**backbone):
    """A detector on a Swin, evaluated by the metric of this package."""
    return dict(
        default_scope='mmdet',
        model=dict(
            type='RetinaNet',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[127.0] * 3, std=[60.0] * 3,
                pad_size_divisor=32,
            ),
            backbone=dict(SWIN, **backbone),
            neck=dict(type='FPN', in_channels=[24, 48], out_channels=16,
                      num_outs=3),
            bbox_head=dict(
                type='RetinaHead', num_classes=2, in_channels=16,
                stacked_convs=1, feat_channels=16,
                anchor_generator=dict(
                    type='AnchorGenerator', octave_base_scale=4,
                    scales_per_octave=1, ratios=[1.0], strides=[4, 8, 16]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
            test_cfg=dict(nms_pre=50, score_thr=0.0, max_per_img=20,
                          nms=dict(type='nms', iou_threshold=0.6)),
        ),
        custom_hooks=[dict(type='lors_plugin.RepAdapterHook')],
        test_evaluator=dict(type='lors_plugin.CocoMetric', metric='bbox',
                            backend='auto', ann_file='a.json'),
    )  # fmt: skip


def two_stage(**backbone):
    """The same with proposals, on which a second stage works."""
    config = detector(**backbone)
    model = config['model']
    anchors = model.pop('bbox_head')
    coder = anchors['bbox_coder']
    nms = dict(type='nms', iou_threshold=0.6)
    anchors.update(type='RPNHead')
    for key in ('num_classes', 'stacked_convs'):
        del anchors[key]
    model.update(
        type='FasterRCNN',
        train_cfg=None,
        rpn_head=anchors,
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor', out_channels=16,
                featmap_strides=[4, 8, 16],
                roi_layer=dict(type='RoIAlign', output_size=3,
                               sampling_ratio=2, use_torchvision=True)),
            bbox_head=dict(
                type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16,
                roi_feat_size=3, num_classes=2, bbox_coder=coder),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=20, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.0, max_per_img=20, nms=nms),
        ),
    )  # fmt: skip
    return config


TOKEN = dict(pool=False, head='VisionTransformer')
HOSTS = {
    'vit': classifier(VIT, **TOKEN),
    'vit-no-bias': classifier(
        dict(VIT, qkv_bias=False), hook=dict(exclude=[r'layers\.0\.attn.*']),
        **TOKEN,
    ),
    'beit': classifier(dict(VIT, type='BEiTViT'), pool=False),
    'swin': classifier(
        dict(type='SwinTransformer', img_size=32, window_size=4,
             arch=dict(embed_dims=24, depths=[2, 2], num_heads=[2, 4]),
             out_indices=(1,)),
        channels=48,
    ),
    'convnext': classifier(
        dict(type='ConvNeXt', arch=dict(depths=[1, 1], channels=[16, 24]),
             out_indices=(1,)),
        pool=False,
    ),
    'resnet': classifier(
        dict(type='ResNet', depth=50, stem_channels=8, base_channels=4,
             num_stages=2, out_indices=(1,), strides=(1, 2),
             dilations=(1, 1)),
        channels=32,
        hook=dict(targets=[r'layer\d\.\d\.conv[13]',
                           r'layer\d\.0\.downsample\.0']),
    ),
    'mobilenet': classifier(
        dict(type='MobileNetV2', widen_factor=0.1),
        channels=1280,
        hook=dict(targets=[r'layer[2-7]\.\d\.conv\.[02]\.conv',
                           r'conv2\.conv']),
    ),
    'detector': detector(),
    'detector-no-bias': detector(qkv_bias=False),
    'two-stage': two_stage(),
}  # fmt: skip


def randomized(model):
    """Weights that are neither 0 nor 1, and statistics too."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
        for name, buffer in model.named_buffers():
            if name.endswith('running_var'):
                buffer.uniform_(0.5, 2)
            elif name.endswith('running_mean'):
                buffer.normal_()
    return model


def make(name, folder, content=None):
    """Write a config, a trained checkpoint, its adapters and its base.

    Returns:
        nn.Module: The trained model.
    """
    cfg = Config(content or HOSTS[name])
    cfg.dump(folder / f'{name}.py')
    torch.manual_seed(0)
    model = randomized(build_base(cfg))
    torch.save(dict(state_dict=model.state_dict()), folder / 'base.pth')
    if asks_for_adapters(cfg):
        adapt(model, cfg, {})
        for key, param in model.named_parameters():
            if 'rep_adapter' in key:
                param.data.normal_(std=0.3)
        torch.save(adapter_checkpoint(model), folder / 'adapter.pth')
    torch.save(
        dict(
            state_dict=model.state_dict(),
            meta=dict(dataset_meta=dict(classes=['a', 'b', 'c']), epoch=3,
                      cfg='lors_plugin', hook_msgs={}),
            optimizer=dict(),
            message_hub=dict(),
        ),
        folder / f'{name}.pth',
    )  # fmt: skip
    return model


@pytest.fixture(scope='session')
def hosts():
    """Names and configs of small models, and what writes files of them."""
    return SimpleNamespace(configs=HOSTS, make=make)
