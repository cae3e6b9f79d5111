"""tools/export.py: files that say what they take, or no file."""

import json

import export as tool
import pytest
import torch
from mmengine.config import Config

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture
def trained(tiny_config, tiny_detector, tmp_path):
    """A config and a checkpoint of a tiny LORS-AdaMixer."""
    decoder = dict(num_stages=1, adaptive_groups=1)
    changes = dict(decoder=decoder, test_cfg=dict(max_per_img=9))
    model = tiny_detector('lors', **changes)
    config = tmp_path / 'tiny.py'
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs', meta_keys=('img_shape', 'scale_factor')),
    ]
    Config(
        dict(
            default_scope='mmdet',
            model=tiny_config('lors', **changes),
            test_dataloader=dict(dataset=dict(pipeline=pipeline)),
        )
    ).dump(config)
    meta = dict(dataset_meta=dict(classes=('a', 'b', 'c')))
    checkpoint = tmp_path / 'tiny.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return str(config), str(checkpoint), str(tmp_path / 'out' / 'tiny.onnx')


def test_a_detector(trained, tmp_path, capsys):
    import cv2
    import numpy as np
    import onnx

    for name, size in (('high.png', (50, 40)), ('wide.png', (40, 50))):
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3))
        cv2.imwrite(str(tmp_path / name), pixels.astype(np.uint8))
    high, wide = (str(tmp_path / f'{n}.png') for n in ('high', 'wide'))
    with pytest.raises(SystemExit):
        tool.parse_args([*trained, '--no-check', '--images', wide])
    # Padded it becomes 64 x 64, and the file is for 64 x 96.
    assert tool.main([*trained, '--fixed-size', '--images', high]) == 2
    assert 'set --shape' in capsys.readouterr().err
    assert tool.main([*trained, '--images', high, wide]) == 0
    assert '6 comparisons' in capsys.readouterr().out
    model = onnx.load(trained[2])
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said['classes']) == ['a', 'b', 'c']
    assert said['channel_order'] == 'RGB'
    assert json.loads(said['mean']) == pytest.approx([123.675, 116.28, 103.53])
    assert json.loads(said['shape']) == [64, 96]
    assert said['size_divisor'] == '32'
    shapes = {
        entry.name: [
            d.dim_param or d.dim_value
            for d in entry.type.tensor_type.shape.dim
        ]
        for entry in (*model.graph.input, *model.graph.output)
    }
    assert shapes['images'] == ['batch', 3, 'height', 'width']
    assert shapes['boxes'] == ['batch', 9, 4]


def test_a_wrong_file_is_not_written(trained, tmp_path, capsys):
    # Nothing is exact to the last bit.
    status = tool.main([*trained, '--static', '--tolerance', '0'])
    assert status == 1
    text = capsys.readouterr().err
    assert 'differ from PyTorch' in text and 'nothing was written' in text
    assert not (tmp_path / 'out').exists()
    # With random weights the cause is likely another one.
    assert 'random weights' not in text
    options = ['--static', '--tolerance', '0']
    assert tool.main([trained[0], 'none', trained[2], *options]) == 1
    assert 'random weights' in capsys.readouterr().err


@pytest.mark.parametrize(
    'place, value, word',
    [
        (1, 'missing.pth', 'missing.pth'),
        (0, 'mmpretrain::a/missing.py', 'missing.py'),
    ],
)
def test_mistakes(trained, place, value, word, capsys):
    command = list(trained)
    command[place] = value
    assert tool.main(command) == 2
    assert word in capsys.readouterr().err


def test_weights_that_are_missing(trained, capsys):
    content = torch.load(trained[1], weights_only=False)
    weight = content['state_dict'].pop('backbone.conv1.weight')
    torch.save(content, trained[1])
    assert tool.main(trained) == 2
    assert 'it has no backbone.conv1.weight' in capsys.readouterr().err
    content['state_dict']['backbone.conv1.weight'] = weight
    content['state_dict']['backbone.adapter.weight'] = weight
    torch.save(content, trained[1])
    assert tool.main(trained) == 2
    assert 'it has backbone.adapter.weight' in capsys.readouterr().err


def single_stage(trained, **model):
    config = Config.fromfile(trained[0])
    neck = dict(
        type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4
    )
    nms = dict(type='nms', iou_threshold=0.5)
    test_cfg = dict(nms_pre=99, score_thr=0.0, nms=nms, max_per_img=9)
    kept = {k: config.model[k] for k in ('backbone', 'data_preprocessor')}
    config.model = dict(kept, neck=neck, test_cfg=test_cfg, **model)
    config.dump(trained[0])


def test_a_detector_of_mmdetection(trained, tmp_path, capsys):
    from lors_plugin.deploy.runtime import Detector

    head = dict(
        type='FCOSHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        strides=[4, 8, 16, 32],
        regress_ranges=((-1, 64), (64, 128), (128, 256), (256, 1e8)),
        norm_cfg=dict(type='GN', num_groups=4),
    )
    single_stage(trained, type='FCOS', bbox_head=head)
    assert tool.main([trained[0], 'none', trained[2]]) == 0
    text = capsys.readouterr().out
    assert '2 comparisons, for one image of up to 64 x 96' in text
    detector = Detector(trained[2])
    assert detector.fixed == [64, 96]
    import numpy as np

    (found,) = detector([np.zeros((20, 40, 3), np.uint8)])
    assert len(found['boxes']) and found['boxes'].max() <= 40


def test_detectors_that_are_refused(trained, capsys):
    head = dict(type='GFLHead', num_classes=2, in_channels=8, stacked_convs=1)
    head['anchor_generator'] = dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
        strides=[4, 8, 16, 32],
    )
    single_stage(trained, type='GFL', bbox_head=head)
    assert tool.main([trained[0], 'none', trained[2]]) == 1
    assert 'GFL with GFLHead predicts in a way' in capsys.readouterr().err


def test_a_classifier_of_gray_images(tmp_path, capsys):
    """Its data preprocessor stands beside the model, where it often is."""
    import onnx

    config = tmp_path / 'gray.py'
    Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(mean=[72.9], std=[90.0]),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='lors_plugin.ParameterNet',
                    arch=dict(width=0.5, rows=[[[3, 16, 16, 0, 2]]]),
                    in_channels=1,
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=8),
            ),
        )
    ).dump(config)
    out = tmp_path / 'gray.onnx'
    command = [str(config), 'none', str(out), '--shape', '28']
    assert tool.main(command) == 0, capsys.readouterr().err
    assert '4 comparisons' in capsys.readouterr().out
    said = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(said['mean']) == pytest.approx([72.9])


@pytest.fixture
def swin(tmp_path):
    """Options for a config of a tiny Swin, checkpoint and file."""
    config = tmp_path / 'swin.py'
    Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(mean=[9.0] * 3, std=[99.0] * 3),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='lors_plugin.DynamicSwinTransformer',
                    arch=dict(embed_dims=8, depths=[1, 2], num_heads=[1, 2]),
                    num_experts=2,
                    window_size=4,
                    out_indices=(1,),
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
            ),
        )
    ).dump(config)
    return [str(config), 'none', str(tmp_path / 'swin.onnx')]


def test_swin_says_its_only_size(swin, capsys):
    import onnx

    assert tool.main([*swin, '--shape', '32', '40']) == 0
    text = capsys.readouterr().out
    assert '2 comparisons, for images of 32 x 40 alone' in text
    (images,) = onnx.load(swin[2]).graph.input
    shape = [
        d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim
    ]
    assert shape == ['batch', 3, 32, 40]
    # Smaller than a window.
    assert tool.main([*swin, '--shape', '8']) == 2
    assert 'cannot run the model on images of 8 x 8' in capsys.readouterr().err


def test_adapters_and_shared_layers_of_the_config_are_merged(tmp_path, capsys):
    hook = dict(type='lors_plugin.RepAdapterHook', targets=[r'conv2\.conv'])
    config = tmp_path / 'adapted.py'
    Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(mean=[9.0] * 3, std=[99.0] * 3),
            custom_hooks=[hook],
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='MobileNetV2', widen_factor=0.1),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(
                    type='LinearClsHead', num_classes=3, in_channels=1280
                ),
            ),
        )
    ).dump(config)
    out = tmp_path / 'adapted.onnx'
    command = [str(config), 'none', str(out), '--shape', '32', '--static']
    assert tool.main(command) == 0, capsys.readouterr().err
    assert out.is_file()


def test_a_hugging_face_classifier_with_merged_adapters(tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=8,
        num_labels=3,
    ).save_pretrained(tmp_path / 'vit')
    hook = dict(
        type='lors_plugin.RepAdapterHook',
        module='model',
        targets=[r'.*intermediate\.dense'],
    )
    config = tmp_path / 'vit.py'
    Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(mean=[9.0] * 3, std=[99.0] * 3),
            custom_hooks=[hook],
            model=dict(
                type='HuggingFaceClassifier', model_name=str(tmp_path / 'vit')
            ),
        )
    ).dump(config)
    from lors_plugin.build import build_model
    from lors_plugin.testing import randomize

    model = randomize(build_model(Config.fromfile(config)))
    checkpoint = str(tmp_path / 'vit.pth')
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    out = tmp_path / 'vit.onnx'
    command = [str(config), checkpoint, str(out), '--shape', '32']
    assert tool.main([*command, '--fixed-size']) == 0, capsys.readouterr().err
    assert '2 comparisons' in capsys.readouterr().out


def test_a_model_of_one_size(swin, capsys):
    config = Config.fromfile(swin[0])
    config.model.backbone = dict(
        type='MlpMixer',
        arch=dict(
            embed_dims=16,
            num_layers=1,
            tokens_mlp_dims=8,
            channels_mlp_dims=8,
        ),
        img_size=32,
    )
    config.model.neck.dim = 1
    config.dump(swin[0])
    assert tool.main([*swin, '--shape', '32']) == 2
    text = capsys.readouterr().err
    assert 'on images of 64 x 128' in text and '--fixed-size makes' in text
    assert tool.main([*swin, '--shape', '32', '--fixed-size']) == 0
    assert '2 comparisons' in capsys.readouterr().out


def test_weights_that_a_host_computes_anew(swin, tmp_path, capsys):
    """Swin V2 takes its tables out of a checkpoint while it is read."""
    from mmengine.registry import DefaultScope

    from lors_plugin.registry import MODELS

    config = Config.fromfile(swin[0])
    arch = dict(config.model.backbone.arch, extra_norm_every_n_blocks=0)
    config.model.backbone = dict(
        type='SwinTransformerV2',
        arch=arch,
        window_size=[4, 4],
        pretrained_window_sizes=[0, 0],
        out_indices=(1,),
    )
    config.dump(swin[0])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
    checkpoint = tmp_path / 'v2.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    command = [swin[0], str(checkpoint), swin[2], '--shape', '32']
    assert tool.main(command) == 0, capsys.readouterr().err
