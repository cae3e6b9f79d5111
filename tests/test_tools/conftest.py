"""Small stock models and data that several tests of tools train on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from PIL import Image


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Run below ``tmp_path``; leave no default scope or logger behind."""
    monkeypatch.chdir(tmp_path)
    known = (DefaultScope, MMLogger)  # loggers write to a stream of then
    before = [dict(kind._instance_dict) for kind in known]
    yield
    for kind, former in zip(known, before):
        kind._instance_dict.clear()
        kind._instance_dict.update(former)


def write_image(path, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(path)))
    pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_config(name, **content):
    path = Path(f'{name}.py')
    path.write_text(Config(content).pretty_text)
    return str(path)


@pytest.fixture
def write_detector(tiny_config):
    """Write a config and weights (``w.pth``) of a tiny detector.

    ``write_detector('a.py')``, with entries of its data set.
    """
    from lors_plugin.build import build_model
    from lors_plugin.testing import randomize

    def make(name, **dataset):
        pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(96, 64), keep_ratio=True),
            dict(type='PackDetInputs'),
        ]
        dataset = dict(
            type='CocoDataset',
            metainfo=dict(classes=('cat', 'dog', '牛')),
            pipeline=pipeline,
            **dataset,
        )
        config = Config(
            dict(
                default_scope='mmdet',
                model=tiny_config(),
                test_dataloader=dict(dataset=dataset),
            )
        )
        Path(name).write_text(config.pretty_text, encoding='utf-8')
        weights = randomize(build_model(config), 0).state_dict()
        torch.save(dict(state_dict=weights), 'w.pth')
        return config

    return make


@pytest.fixture
def classification(request, in_tmp_path):
    """A LeNet on six images of three classes."""
    for name in 'abc':
        for index in range(2):
            write_image(Path('images') / name / f'{index}.png')
    pipeline = [
        dict(type='LoadImageFromFile', color_type='grayscale'),
        dict(type='PackInputs'),
    ]
    loader = dict(
        batch_size=3,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CustomDataset', data_root='images', pipeline=pipeline
        ),
    )
    return write_config(
        request.node.name.split('[')[0],
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='LeNet5'),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=3,
                in_channels=120,
                loss=dict(type='CrossEntropyLoss'),
            ),
            data_preprocessor=dict(mean=[127.0], std=[64.0], num_classes=3),
        ),
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        val_cfg=dict(),
        test_cfg=dict(),
        auto_scale_lr=dict(base_batch_size=6),
        default_hooks=dict(visualization=dict(type='VisualizationHook')),
    )


@pytest.fixture
def detection(request, in_tmp_path):
    """A tiny DETR on two images with one box each."""
    images, annotations = [], []
    for index in range(2):
        write_image(Path('coco') / 'img' / f'{index}.png', 64)
        images.append(
            dict(id=index, file_name=f'{index}.png', width=64, height=64)
        )
        annotations.append(
            dict(
                id=index,
                image_id=index,
                category_id=1,
                bbox=[8, 8, 24, 30],
                area=720,
                iscrowd=0,
            )
        )
    Path('coco/a.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='tree')],
            )
        )
    )
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CocoDataset',
            data_root='coco',
            ann_file='a.json',
            data_prefix=dict(img='img'),
            metainfo=dict(classes=('tree',)),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 64)),
                dict(type='PackDetInputs', meta_keys=meta),
            ],
        ),
    )
    evaluator = dict(type='CocoMetric', ann_file='coco/a.json', metric='bbox')
    attention = dict(embed_dims=16, num_heads=2)
    ffn = dict(embed_dims=16, feedforward_channels=16)
    return write_config(
        request.node.name.split('[')[0],
        default_scope='mmdet',
        model=dict(
            type='DETR',
            num_queries=5,
            data_preprocessor=dict(type='DetDataPreprocessor'),
            backbone=dict(type='ResNet', depth=18, num_stages=1,
                          strides=(1,), dilations=(1,), out_indices=(0,),
                          base_channels=8),
            neck=dict(type='ChannelMapper', in_channels=[8], kernel_size=1,
                      out_channels=16, num_outs=1, norm_cfg=None),
            encoder=dict(num_layers=1, layer_cfg=dict(
                self_attn_cfg=attention, ffn_cfg=ffn)),
            decoder=dict(num_layers=1, layer_cfg=dict(
                self_attn_cfg=attention, cross_attn_cfg=attention,
                ffn_cfg=ffn), return_intermediate=True),
            positional_encoding=dict(num_feats=8, normalize=True),
            bbox_head=dict(
                type='DETRHead', num_classes=1, embed_dims=16,
                loss_cls=dict(type='CrossEntropyLoss', bg_cls_weight=0.1,
                              use_sigmoid=False, loss_weight=1.0,
                              class_weight=1.0)),
            train_cfg=dict(assigner=dict(
                type='HungarianAssigner',
                match_costs=[dict(type='ClassificationCost', weight=1.0)])),
            test_cfg=dict(max_per_img=5),
        ),
        train_dataloader=loader,
        test_dataloader=loader,
        test_evaluator=evaluator,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        test_cfg=dict(),
        default_hooks=dict(visualization=dict(type='DetVisualizationHook')),
    )  # fmt: skip


@pytest.fixture
def fails(capsys):
    """Run a tool, expect exit code 2 and return what it said."""

    def run(main, *argv):
        with pytest.raises(SystemExit) as error:
            main(list(argv))
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert 'Traceback' not in text
        return text[text.index('error: ') :]

    return run
