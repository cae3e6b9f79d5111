"""Detectors of MMDetection: files against their own predictions."""

from copy import deepcopy

import pytest
from mmengine.config import ConfigDict

from lors_plugin.deploy.engines import OnnxRuntimeEngine
from lors_plugin.export import ExportError, export_file, for_export
from lors_plugin.export.cases import detector_case, random_images
from lors_plugin.export.check import check, without_results
from lors_plugin.export.stock import stock_detector
from lors_plugin.testing import randomize

pytest.importorskip('onnxruntime')
SHAPE = 96, 128
LAYER = dict(
    self_attn_cfg=dict(embed_dims=16, num_heads=2, num_levels=2),
    cross_attn_cfg=dict(embed_dims=16, num_heads=2, num_levels=2),
    ffn_cfg=dict(embed_dims=16, feedforward_channels=8),
)
ENCODER = {k: v for k, v in LAYER.items() if k != 'cross_attn_cfg'}
QUERIES = dict(embed_dims=16, num_heads=2)
DINO = dict(
    type='DINO',
    num_queries=12,
    with_box_refine=True,
    as_two_stage=True,
    num_feature_levels=2,
    neck=dict(
        type='ChannelMapper',
        in_channels=[16, 32],
        kernel_size=1,
        out_channels=16,
        num_outs=2,
    ),
    encoder=dict(num_layers=1, layer_cfg=ENCODER),
    decoder=dict(
        num_layers=1,
        return_intermediate=True,
        layer_cfg=dict(LAYER, self_attn_cfg=QUERIES),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=8, normalize=True),
    bbox_head=dict(
        type='DINOHead',
        num_classes=3,
        embed_dims=16,
        sync_cls_avg_factor=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=10),
    ),
    test_cfg=dict(max_per_img=9),
)
DETR = dict(
    type='DETR',
    num_queries=12,
    neck=dict(
        type='ChannelMapper',
        in_channels=[32],
        kernel_size=1,
        out_channels=16,
        num_outs=1,
    ),
    encoder=dict(num_layers=1, layer_cfg=dict(ENCODER, self_attn_cfg=QUERIES)),
    decoder=dict(
        num_layers=1,
        return_intermediate=True,
        layer_cfg=dict(LAYER, self_attn_cfg=QUERIES, cross_attn_cfg=QUERIES),
    ),
    positional_encoding=dict(num_feats=8, normalize=True),
    bbox_head=dict(type='DETRHead', num_classes=3, embed_dims=16),
    test_cfg=dict(max_per_img=9),
)
RETINA = dict(
    type='RetinaNet',
    neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=2),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16],
        ),
    ),
    test_cfg=dict(
        nms_pre=200,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=20,
    ),
)


def tiny(build, tiny_config, config):
    wanted = deepcopy(config)
    number = len(wanted['neck']['in_channels'])
    backbone = dict(tiny_config()['backbone'])
    backbone['out_indices'] = (1, 2) if number == 2 else (2,)
    preprocessor = dict(tiny_config()['data_preprocessor'], pad_size_divisor=1)
    return randomize(
        build(dict(wanted, backbone=backbone, data_preprocessor=preprocessor))
    ).eval()


@pytest.mark.parametrize(
    'config, sampling',
    [(DINO, 'gather'), (DETR, 'gather'), (RETINA, 'grid_sample')],
    ids=['dino', 'detr', 'retinanet'],
)
def test_files(config, sampling, build, tiny_config):
    model = tiny(build, tiny_config, config)
    model.bbox_head.test_cfg = ConfigDict(config['test_cfg'])
    module = stock_detector(for_export(model, 1)).eval()

    def case(*shape):
        images = random_images(1, shape, shape[0])
        return detector_case(model, images, 'float', SHAPE)

    cases = [case(*SHAPE), case(70, 101)]
    assert without_results(cases) == 0
    # Padding is masked, and clips boxes.
    assert cases[1][1][0][..., 2].max() <= 101
    assert all(len(scores[0]) > 5 for _, (_, scores, _) in cases)
    content = export_file(
        module,
        cases[0][0],
        dynamic_batch=False,
        dynamic_size=False,
        sampling=sampling,
    )
    assert check(OnnxRuntimeEngine(content), cases, 1e-3) < 1e-3


def test_cases_that_compare_nothing_are_counted(build, tiny_config):
    model = tiny(build, tiny_config, RETINA)
    images = random_images(1, SHAPE, 0)
    cases = []
    for threshold in (0.05, 1.0):
        test_cfg = ConfigDict(RETINA['test_cfg'], score_thr=threshold)
        model.bbox_head.test_cfg = test_cfg
        cases.append(detector_case(model, images, 'float', SHAPE))
    assert without_results(cases) == 1


def test_another_nms_is_refused(build, tiny_config):
    config = deepcopy(RETINA)
    config['test_cfg']['nms']['type'] = 'soft_nms'
    with pytest.raises(ExportError, match='soft_nms.*only type="nms"'):
        stock_detector(tiny(build, tiny_config, config))
