"""tools/reparam.py on models of this package."""

import mmcv
import numpy as np
import pytest
import reparam
import torch
from mmengine.config import Config

from lors_plugin.build import image_channels
from lors_plugin.reparam.structure import build_base

BACKBONE = dict(depth=50, base_channels=4)
ROWS = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2], [3, 48, 24, 0, 1]]]


@pytest.fixture
def run(hosts, tmp_path):
    """Make, merge and build again: config, plain model, its file."""

    def make(content, *argv):
        hosts.make('model', tmp_path, content)
        paths = [str(tmp_path / n) for n in ('model.py', 'model.pth', 'o.pth')]
        argv = [*paths, '--shape', '64', '64', '--repeats', '0', *argv]
        assert reparam.main(argv) == 0
        cfg = Config.fromfile(tmp_path / 'o.py')
        model = build_base(cfg)
        state = torch.load(tmp_path / 'o.pth', weights_only=True)['state_dict']
        model.load_state_dict(state, strict=True)
        return cfg, model

    return make


def test_detector_with_an_adapted_backbone(run, tiny_config, capsys):
    detector = tiny_config(
        'lors',
        backbone=BACKBONE,
        neck=dict(in_channels=[16, 32, 64, 128]),
    )
    hook = dict(
        type='lors_plugin.RepAdapterHook',
        targets=[r'layer\d\.\d\.conv[13]'],
        hidden_dims=4,
    )
    content = dict(
        default_scope='mmdet',
        model=detector,
        custom_hooks=[hook, dict(type='lors_plugin.EpochSeedHook')],
        val_evaluator=dict(type='lors_plugin.CocoMetric', metric='bbox'),
    )
    cfg, model = run(content)
    assert cfg.model.type == 'lors_plugin.AdaMixer'
    assert cfg.val_evaluator.type == 'lors_plugin.CocoMetric'
    assert [h.type for h in cfg.custom_hooks] == ['lors_plugin.EpochSeedHook']
    # The low-rank parts of the decoder stay apart on purpose.
    names = {type(m).__name__ for m in model.modules()}
    assert 'LowRankLinearStack' in names and 'RepAdapter' not in names
    assert 'raw outputs' in capsys.readouterr().out


def classifier(backbone, channels, **rest):
    head = dict(type='LinearClsHead', num_classes=3, in_channels=channels)
    return dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=head,
            data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3),
        ),
        **rest,
    )


def test_branches_of_convolutions_become_a_ghostnet(run):
    plain = dict(
        type='lors_plugin.ParameterNet', arch=dict(rows=ROWS, width=0.5)
    )
    cfg, model = run(classifier(dict(plain, conv='rep'), 24))
    assert cfg.model.backbone == dict(plain, num_experts=1, deploy=True)
    assert 'RepConv2d' not in {type(m).__name__ for m in model.modules()}


@pytest.mark.parametrize('host', ['classifier', 'detector'])
def test_dynamic_convolutions_are_converted(host, run, tiny_config):
    """Norms are folded; the written config builds that form."""
    backbone = dict(
        type='lors_plugin.ParameterNet',
        arch=dict(rows=[*ROWS, *ROWS[1:] * 3], width=0.5),
        out_indices=(1, 2, 3, 4),
    )
    content = classifier(dict(backbone, out_indices=(-1,)), 24)
    if host == 'detector':
        neck = dict(in_channels=[12] * 4)
        detector = tiny_config('lors', backbone=BACKBONE, neck=neck)
        detector['backbone'] = backbone
        content = dict(default_scope='mmdet', model=detector)
    cfg, model = run(content, '--batches', '2')
    assert cfg.model.backbone.deploy
    names = {type(m).__name__ for m in model.backbone.modules()}
    assert 'CPUGhostBottleneck' in names and 'BatchNorm2d' not in names


def test_gray_images(run, tmp_path):
    gray = dict(
        type='lors_plugin.ParameterNet', arch=dict(rows=ROWS, width=0.5),
        conv='rep', in_channels=1,
    )  # fmt: skip
    content = classifier(gray, 24)
    content['model']['data_preprocessor'] = dict(mean=[33.0], std=[79.0])
    photo = tmp_path / 'a.png'
    mmcv.imwrite(np.arange(4096, dtype=np.uint8).reshape(64, 64), str(photo))
    _, model = run(content)
    assert image_channels(model) == 1
    run(content, '--images', str(photo), '--force')


SHARED = dict(targets=[r'layers\.(\d+)\.(?:ffn\.layers\.0\.0)'], ranks=4)


@pytest.mark.parametrize('by', ['entry', 'hook'])
def test_shared_layers_become_plain_ones(run, hosts, by):
    vit = dict(hosts.configs['vit']['model']['backbone'], out_type='featmap')
    if by == 'entry':
        stack = dict(type='lors_plugin.LORSStack', module=vit, **SHARED)
        content = classifier(stack, 24)
    else:
        hook = dict(type='lors_plugin.LORSHook', module='backbone', **SHARED)
        content = classifier(vit, 24, custom_hooks=[hook])
    cfg, model = run(content, '--dtype', 'bfloat16')
    assert 'lors_plugin' not in cfg.pretty_text
    assert cfg.model.backbone.type == 'VisionTransformer'
