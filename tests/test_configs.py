"""Every config parses, builds, trains a step, and is what its name says."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.compat import MissingOpError
from lors_plugin.models.roi_heads import AdaMixerDecoder, LORSAdaMixerDecoder

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
)
COCO = [path for path in CONFIGS if path.endswith('_coco.py')]


@pytest.fixture(params=CONFIGS, ids=lambda path: Path(path).stem)
def path(request):
    return request.param


def test_there_are_configs():
    assert {Path(path).parent.name for path in CONFIGS} >= {
        'adamixer',
        'lors_adamixer',
    }


def test_trains_a_step(path, load_config, build, make_samples):
    """Forward, loss and backward at a small size; nothing is unused.

    An unused parameter would stop a training with several processes.
    """
    config = load_config(path)
    assert config.default_scope == 'mmdet', 'only detectors are run here'
    model = build(config.model).train()
    samples = make_samples((3, 0), 1, [(96, 64), (64, 96)])
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
        pytest.skip(str(error))
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    unused = [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and param.grad is None
    ]
    assert not unused
    for name, param in model.named_parameters():
        if param.grad is not None:
            assert param.grad.isfinite().all(), name


def test_name_tells_the_truth(path, load_config, build):
    config = load_config(path)
    stem = Path(path).stem
    with torch.device('meta'):
        model = build(config.model)
    lors = isinstance(model.decoder, LORSAdaMixerDecoder)
    assert isinstance(model.decoder, AdaMixerDecoder)
    assert lors == stem.startswith('lors-adamixer')
    claims = dict(
        (key, int(number))
        for key, pattern in (
            ('queries', r'[-_](\d+)(?:q|-queries)_'),
            ('depth', r'_[rx](\d+)[-_]'),
            ('gpus', r'[-_](\d+)xb\d'),
            ('batch', r'xb(\d+)'),
            ('schedule', r'[-_](\d+)x_'),
        )
        for number in re.findall(pattern, stem)[:1]
    )
    queries = claims.get('queries', 100 if stem.endswith('_coco') else None)
    if queries:
        assert model.query_generator.num_queries == queries
        assert (model.decoder.max_per_img or queries) == queries
    if 'depth' in claims:
        assert model.backbone.depth == claims['depth']
    if 'batch' in claims:
        batch = config.train_dataloader.batch_size
        assert batch == claims['batch']
        scale = config.auto_scale_lr
        assert scale.base_batch_size == batch * claims['gpus']
    if 'schedule' in claims:
        assert config.train_cfg.max_epochs == 12 * claims['schedule']
    if stem.endswith('_coco'):
        assert model.decoder.num_classes == 80
        assert model.decoder.num_stages == 6


@pytest.mark.parametrize('path', COCO, ids=lambda path: Path(path).stem)
def test_recipe(path):
    """Section 1 of the AdaMixer paper's appendix, for any schedule."""
    config = Config.fromfile(ROOT / path)
    wrapper = config.optim_wrapper
    assert wrapper.optimizer.type == 'AdamW'
    assert wrapper.optimizer.lr == 2.5e-5
    assert wrapper.optimizer.weight_decay == 1e-4
    assert 'momentum' not in wrapper.optimizer
    assert wrapper.clip_grad == dict(max_norm=1.0, norm_type=2)
    warm_up, steps = config.param_scheduler
    assert warm_up.type == 'LinearLR'
    assert warm_up.start_factor == 1e-3
    assert warm_up.by_epoch is False
    assert (warm_up.begin, warm_up.end) == (
        0,
        1000 if 'swin' in path else 500,
    )
    assert steps.type == 'MultiStepLR'
    assert steps.gamma == 0.1
    if '1x_coco' in path:
        assert steps.milestones == [8, 11]
        scales = [
            step.scale
            for step in config.train_pipeline
            if step.type == 'Resize'
        ]
        assert scales == [(1333, 800)]
    decoder = config.model.decoder
    weights = (
        decoder.loss_cls.loss_weight,
        decoder.loss_bbox.loss_weight,
        decoder.loss_iou.loss_weight,
    )
    costs = config.model.train_cfg.assigner.match_costs
    assert weights == (2.0, 5.0, 2.0) == tuple(c.weight for c in costs)


def test_lors_settings_of_the_paper(load_config, build):
    config = load_config(
        'configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'
    )
    with torch.device('meta'):
        decoder = build(config.model).decoder
    mixing = decoder.mixing
    assert (mixing.shape.groups, mixing.shape.width) == (2, 128)
    assert (mixing.shape.in_points, mixing.shape.out_points) == (64, 128)
    assert mixing.channel_part.ranks == [16] * 6
    assert mixing.spatial_part.groups == [1, 1, 2, 2, 3, 3]
    assert [len(down) for down in mixing.out_proj.down] == [8] * 6


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('adamixer', {}),
        ('lors_adamixer', dict(adaptive_groups=[1, 1, 2, 3])),
    ],
)
def test_edited_as_a_user_would(
    kind, options, load_config, build, make_samples
):
    """Other classes, backbone, queries and stages, by overriding entries."""
    (path,) = (p for p in COCO if p.endswith(f'/{KINDS[kind]}'))
    config = load_config(path)
    config.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.neck.in_channels': [64, 128, 256, 512],
            'model.query_generator.num_queries': 300,
            'model.decoder.num_classes': 7,
            'model.decoder.num_stages': 4,
            'model.decoder.feedforward_channels': 64,
            'model.decoder.out_points': 16,
            **{f'model.decoder.{k}': v for k, v in options.items()},
        }
    )
    model = build(config.model).train()
    samples = make_samples((3,), 7, (64, 64))
    losses = model.loss(torch.randn(1, 3, 64, 64), samples)
    assert len(losses) == 12
    total, _ = model.parse_losses(losses)
    total.backward()
    results = model.predict(torch.randn(1, 3, 64, 64), samples)
    assert len(results[0].pred_instances) == 300


KINDS = dict(
    adamixer='adamixer_r50_8xb2-1x_coco.py',
    lors_adamixer='lors-adamixer_r50_8xb2-1x_coco.py',
)
