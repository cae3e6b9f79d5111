"""A tiny detector and a tiny classifier, exported once."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config


@pytest.fixture(scope='session')
def export():
    import export

    return export.main


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Files of images: wide, high, tiny, large."""
    folder = tmp_path_factory.mktemp('photos')
    found = []
    for index, (height, width) in enumerate(
        [(50, 80), (90, 40), (7, 9), (300, 310)]
    ):
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=2)
        found.append(str(folder / f'{index}.png'))
        cv2.imwrite(found[-1], image)
    return found


@pytest.fixture(scope='session')
def detector(tmp_path_factory, tiny_config, tiny_detector):
    """Config, checkpoint and folder of a tiny LORS-AdaMixer."""
    folder = tmp_path_factory.mktemp('detector')
    changes = dict(
        decoder=dict(num_stages=1, adaptive_groups=1),
        test_cfg=dict(max_per_img=9),
    )
    config = tiny_config('lors', **changes)
    model = tiny_detector('lors', **changes).eval()
    pipeline = [
        dict(type='LoadImageFromFile', backend_args=None),
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'img_shape', 'scale_factor'),
        ),
    ]
    Config(
        dict(
            default_scope='mmdet',
            model=config,
            test_dataloader=dict(
                dataset=dict(type='CocoDataset', pipeline=pipeline)
            ),
            test_evaluator=dict(type='CocoMetric'),
            visualizer=dict(type='DetLocalVisualizer', vis_backends=[]),
        )
    ).dump(folder / 'tiny.py')
    meta = dict(dataset_meta=dict(classes=('a', 'b', 'c')))
    torch.save(
        dict(state_dict=model.state_dict(), meta=meta), folder / 'tiny.pth'
    )
    return SimpleNamespace(
        config=str(folder / 'tiny.py'),
        checkpoint=str(folder / 'tiny.pth'),
        folder=folder,
    )


@pytest.fixture(scope='session')
def file_of(detector, export):
    """Files by what an image is to the model, and by further options."""
    files = {}

    def make(kind='float', *options):
        key = (kind, *options)
        if key not in files:
            out = str(detector.folder / f'{len(files)}.onnx')
            command = [detector.config, detector.checkpoint, out]
            command += ['--no-check', '--input', kind, *options]
            assert export(command) == 0
            files[key] = out
        return files[key]

    return make


@pytest.fixture(scope='session')
def classifier(export, tmp_path_factory):
    """Config, checkpoint and ONNX file of a tiny classifier."""
    folder = tmp_path_factory.mktemp('classifier')
    config = Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(
                mean=[120.0, 110.0, 100.0], std=[60.0] * 3, to_rgb=True
            ),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='ResNet', depth=18, stem_channels=8, base_channels=8
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=7, in_channels=64),
            ),
            test_dataloader=dict(
                dataset=dict(
                    pipeline=[
                        dict(type='LoadImageFromFile'),
                        dict(type='ResizeEdge', scale=40, edge='short'),
                        dict(type='CenterCrop', crop_size=32),
                        dict(type='PackInputs'),
                    ]
                )
            ),
        )
    )
    config.dump(folder / 'a.py')
    import mmpretrain.models  # noqa: F401

    from lors_plugin.build import build_model
    from lors_plugin.testing import randomize

    model = randomize(build_model(config))
    meta = dict(dataset_meta=dict(classes=tuple('abcdefg')))
    torch.save(
        dict(state_dict=model.state_dict(), meta=meta), folder / 'a.pth'
    )
    files = [str(folder / f'a.{ending}') for ending in ('py', 'pth', 'onnx')]
    assert export(files) == 0
    return files
