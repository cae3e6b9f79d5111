"""Every config builds, trains a step, and is what its name says."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config

from lors_plugin.adamixer.decoder import AdaMixerDecoder
from lors_plugin.adamixer.lors_decoder import LORSAdaMixerDecoder
from lors_plugin.compat import MissingOpError

CROP = '8xb2-crop-ms-480-800-3x_coco'
PUBLISHED = dict(
    adamixer=[
        'adamixer_r50_8xb2-1x_coco',
        'adamixer_r50-g2-p64_8xb2-1x_coco',
        'adamixer_r50_300-queries_8xb2-1x_coco',
        'adamixer_r50_8xb2-ms-480-800-3x_coco',
        'adamixer_r101_8xb2-ms-480-800-3x_coco',
        'adamixer_r50_300-queries_8xb2-ms-480-800-3x_coco',
        f'adamixer_r50_{CROP}',
        f'adamixer_r50_300-queries_{CROP}',
        f'adamixer_r101_300-queries_{CROP}',
        f'adamixer_x101-32x4d-dconv-c3-c5_300-queries_{CROP}',
        f'adamixer_swin-s-p4-w7_300-queries_{CROP}',
    ],
    lors_adamixer=[
        'lors-adamixer_r50_8xb2-1x_coco',
        'lors-adamixer_r50_300-queries_8xb2-1x_coco',
        'lors-adamixer_r50-g4-p32_8xb2-1x_coco',
        f'lors-adamixer_r50_{CROP}',
        f'lors-adamixer_r50_300-queries_{CROP}',
        f'lors-adamixer_r101_300-queries_{CROP}',
        f'lors-adamixer_swin-s-p4-w7_300-queries_{CROP}',
    ],
)
BACKBONES = {
    'r50': dict(type='ResNet', depth=50),
    'r101': dict(type='ResNet', depth=101),
    'x101-32x4d-dconv-c3-c5': dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        stage_with_dcn=(False, True, True, True),
    ),
    'swin-s-p4-w7': dict(
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
    ),
}
trained = set()


@pytest.mark.parametrize('folder', PUBLISHED)
def test_every_published_model_is_there(folder, root):
    files = {f.stem for f in (root / 'configs' / folder).glob('*_coco.py')}
    assert files == set(PUBLISHED[folder])


def queries_of(path):
    """What a name says: (queries); AdaMixer's hundred if it says nothing."""
    stem = Path(path).stem
    number = re.search(r'_(\d+)(?:q|-queries)_', stem)
    return int(number[1]) if number else 100 * stem.endswith('_coco')


def test_trains_and_detects(path, narrow_config, build, make_samples):
    """A step and a prediction with narrow layers; nothing is unused.

    An unused parameter would stop a training with several processes.
    """
    config = narrow_config(path)
    key = json.dumps(config, sort_keys=True)
    if key in trained:
        return  # the very same model under another schedule
    model = build(config).train()
    classes = config.decoder.num_classes
    samples = make_samples((3, 0), classes, [(96, 64), (64, 96)])
    inputs = [
        torch.randint(0, 256, (3, *sample.img_shape), dtype=torch.uint8)
        for sample in samples
    ]
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True
    )
    try:
        losses = model(**data, mode='loss')
    except MissingOpError as error:
        assert 'dconv' in path
        pytest.skip(str(error))
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert param.grad is not None, name
            assert param.grad.isfinite().all(), name

    with torch.no_grad():
        results = model.eval()(**data, mode='predict')
    found = {len(result.pred_instances) for result in results}
    assert found == {config.query_generator.num_queries * min(classes, 1)}
    trained.add(key)


def test_name_tells_the_truth(path, load_config, full_size):
    stem = Path(path).stem
    config, model = load_config(path), full_size(path)
    assert config.default_scope == 'mmdet'
    decoder = model.decoder
    assert isinstance(decoder, AdaMixerDecoder)
    assert isinstance(decoder, LORSAdaMixerDecoder) == stem.startswith('lors-')
    queries = queries_of(path)
    if queries:
        assert model.query_generator.num_queries == queries
        assert (decoder.max_per_img or queries) == queries
    shape = re.search(r'-g(\d+)-p(\d+)', stem)
    if shape:
        assert decoder.num_groups == [int(shape[1])] * decoder.num_stages
        assert decoder.in_points == [int(shape[2])] * decoder.num_stages
    batch = re.search(r'_(\d+)xb(\d+)-', stem)
    if batch:
        gpus, images = map(int, batch.groups())
        assert config.train_dataloader.batch_size == images
        assert config.auto_scale_lr.base_batch_size == gpus * images


def test_published_model(coco_path, load_config, full_size):
    """Sizes of the papers, whatever the config inherits."""
    config, model = load_config(coco_path), full_size(coco_path)
    stem, decoder = Path(coco_path).stem, model.decoder
    parts = stem.split('_')
    name = re.sub(r'-g\d+-p\d+$', '', parts[1])
    for option, value in BACKBONES[name].items():
        assert config.model.backbone[option] == value
    groups, points = (2, 64) if stem.startswith('lors-') else (4, 32)
    named = re.search(r'-g(\d+)-p(\d+)_', stem)
    if named:
        groups, points = map(int, named.groups())
    assert decoder.num_stages == 6
    assert decoder.num_groups == [groups] * 6
    assert decoder.in_points == [points] * 6
    assert decoder.out_points == [128] * 6
    assert (decoder.num_classes, decoder.embed_dims) == (80, 256)
    assert decoder.strides == (4, 8, 16, 32)
    stage = decoder.stages[0]
    assert stage.attention.num_heads == 8
    assert stage.ffn.feedforward_channels == 2048
    if stem.startswith('lors-'):
        mixing = decoder.mixing
        assert mixing.channel_part.ranks == [16] * 6
        assert mixing.spatial_part.groups == [1, 1, 2, 2, 3, 3]
        assert [len(down) for down in mixing.out_proj.down] == [8] * 6


def test_resnets_are_frozen_as_published(coco_path, full_size, load_config):
    if 'swin' in coco_path:
        pytest.skip('Swin has no BatchNorm and is trained as a whole')
    backbone = load_config(coco_path).model.backbone
    assert backbone.norm_eval is True
    trained = {
        name.split('.')[0]
        for name, param in full_size(coco_path).backbone.named_parameters()
        if param.requires_grad
    }
    assert trained == {'layer2', 'layer3', 'layer4'}


def test_metafile_tells_the_truth(path, full_size, load_config, root):
    """Numbers of parameters and epochs."""
    metafile = (root / path).parent / 'metafile.yml'
    models = yaml.safe_load(metafile.read_text())['Models']
    (entry,) = (m for m in models if m['Config'] == path)
    claims = entry['Metadata']
    model = full_size(path)
    truth = dict(
        Epochs=load_config(path).train_cfg.max_epochs,
        Parameters=sum(p.numel() for p in model.parameters()),
    )
    for key, value in truth.items():
        if path.endswith('_coco.py') or key in claims:
            assert claims[key] == value, key


def test_readme_has_a_row(path, full_size, root):
    readme = (root / path).parent / 'README.md'
    stem = Path(path).stem
    rows = [
        row
        for row in readme.read_text().splitlines()
        if row.startswith(f'| [{stem}]({stem}.py) |')
    ]
    assert rows, f'{readme} has no row for {stem}'
    queries = full_size(path).query_generator.num_queries
    assert any(f'| {queries} |' in row for row in rows)


@pytest.mark.parametrize('folder', PUBLISHED)
def test_edited_as_a_user_would(folder, narrow_config, build, make_samples):
    """Other classes, backbone, queries and stages, by overriding entries."""
    model = narrow_config(f'configs/{folder}/{PUBLISHED[folder][0]}.py')
    config = Config(dict(model=model))
    config.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.neck.in_channels': [8, 16, 32, 64],
            'model.query_generator.num_queries': 300,
            'model.decoder.num_classes': 7,
            'model.decoder.num_stages': 4,
            'model.decoder.feedforward_channels': 64,
        }
    )
    if folder == 'lors_adamixer':
        config.model.decoder.adaptive_groups = [1, 1, 2, 3]
    model = build(config.model).train()
    samples = make_samples((3,), 7, (64, 64))
    losses = model.loss(torch.randn(1, 3, 64, 64), samples)
    assert len(losses) == 12
    total, _ = model.parse_losses(losses)
    total.backward()
    results = model.predict(torch.randn(1, 3, 64, 64), samples)
    assert len(results[0].pred_instances) == 300
