"""ParameterNet: every config builds, the recipes are as published."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.registry import DefaultScope

from lors_plugin.registry import MODELS

ROOT = Path(__file__).parents[2]
FOLDER = 'configs/parameternet'
CONFIGS = sorted((ROOT / FOLDER).glob('*.py'))
CLASSIFIERS = [p for p in CONFIGS if re.search(r'_in\d+k$', p.stem)]
DETECTORS = [p for p in CONFIGS if re.search(r'_(coco|bccd)$', p.stem)]
# Epochs, warm-up, batch, learning rate, decay.
RECIPES = dict(
    scratch=(300, 20, 1024, 1e-3, 0.05),
    in21k=(90, 5, 4096, 4e-3, 0.05),
    finetune=(30, 0, 512, 5e-4, 1e-8),
)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def decay_of_position_biases(config):
    keys = config.optim_wrapper.paramwise_cfg.get('custom_keys', {})
    return keys.get('.relative_position_bias_table', {}).get('decay_mult')


def recipe_of(path):
    if path.stem.endswith('_in21k'):
        return 'in21k'
    return 'finetune' if '_in21k-pre_' in path.stem else 'scratch'


def test_there_are_configs():
    assert len(CLASSIFIERS) == 39
    assert len(DETECTORS) == 4


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda p: p.stem)
def test_recipe(path, load_config):
    config = load_config(relative(path))
    epochs, warm_up, batch, lr, decay = RECIPES[recipe_of(path)]
    assert config.train_cfg.max_epochs == epochs
    first, last = config.param_scheduler[0], config.param_scheduler[-1]
    assert (first.type == 'LinearLR') == (warm_up > 0)
    assert first.end == (warm_up or epochs)
    assert last.type == 'CosineAnnealingLR'
    assert (last.begin, last.end) == (warm_up, epochs)
    assert config.auto_scale_lr.base_batch_size == batch
    gpus, images = map(int, re.search(r'_(\d+)xb(\d+)_', path.stem).groups())
    assert gpus * images == batch
    assert config.train_dataloader.batch_size == images
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW'
    assert (optimizer.lr, optimizer.weight_decay) == (lr, decay)
    steps = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert 'RandAugment' in steps
    assert ('RandomErasing' in steps) == (recipe_of(path) != 'finetune')
    assert config.model.head.loss.label_smooth_val == 0.1
    assert 'Mixup' not in str(config.model)


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda p: p.stem)
def test_model(path, load_config, full_size):
    config = load_config(relative(path))
    model, stem = full_size(relative(path)), path.stem
    classes = 21841 if stem.endswith('_in21k') else 1000
    assert model.head.num_classes == classes
    options = config.model.backbone
    plain = 'efficientnet' in stem and '-dynamic' not in stem
    experts = options.get('num_experts', 1 if plain else 4)
    dynamic = 'parameternet' in stem or '-dynamic' in stem
    number = re.search(r'-(\d)e_', stem)
    assert experts == (int(number[1] if number else 4) if dynamic else 1)
    assert (options.get('conv') == 'rep') == ('-rep_' in stem)
    if 'swin' in stem:
        assert options.arch.embed_dims == 24
        assert decay_of_position_biases(config) == 0
        return
    if 'efficientnet' in stem:
        arch = options.get('module', options).arch
        assert f'-{arch}' in stem
        return
    arch = re.search(r'ghostnet-1\.0|(?<=-)\d00m', stem)[0]
    assert options.arch == arch
    assert model.backbone.out_channels[-1] == model.head.in_channels
    routing = options.get('routing', 'sigmoid_linear')
    assert (routing == 'softmax_mlp') == ('-softmax' in stem)


@pytest.mark.parametrize(
    'path',
    [p for p in CLASSIFIERS if recipe_of(p) == 'finetune'],
    ids=lambda p: p.stem,
)
def test_fine_tuning_starts_from_its_own_pretraining(path, load_config):
    start = Path(load_config(relative(path)).load_from)
    name = path.stem.replace('in21k-pre_8xb64_in1k', '8xb512_in21k')
    assert start.parts[-2:] == (name, 'epoch_90.pth')
    assert path.with_name(f'{name}.py') in CLASSIFIERS


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_metafile_and_readme(path, load_config, full_size):
    models = yaml.safe_load((ROOT / FOLDER / 'metafile.yml').read_text())
    (entry,) = (m for m in models['Models'] if m['Config'] == relative(path))
    claims, config = entry['Metadata'], load_config(relative(path))
    assert claims['Epochs'] == config.train_cfg.max_epochs
    if 'Parameters' in claims:
        model = full_size(relative(path))
        number = sum(p.numel() for p in model.parameters())
        assert claims['Parameters'] == number
    row = f'| [{path.stem}]({path.name}) |'
    assert row in (ROOT / FOLDER / 'README.md').read_text()


def test_a_small_classifier_trains(load_config):
    from mmpretrain.structures import DataSample

    config = load_config(f'{FOLDER}/parameternet-tiny_fashion-mnist.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model).train()
    samples = [DataSample().set_gt_label(label) for label in (3, 9)]
    loss = model.loss(torch.randn(2, 1, 28, 28), samples)['loss']
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    (first, _) = model.predict(torch.randn(2, 1, 28, 28), samples)
    assert first.pred_score.shape == (10,)


@pytest.mark.parametrize('path', DETECTORS, ids=lambda p: p.stem)
def test_detectors_train(path, load_config, build, make_samples):
    config = load_config(relative(path)).model
    config.backbone.width = 0.25
    widths = full_backbone(config.backbone)
    config.neck.in_channels = list(widths)
    if 'decoder' in config:
        config.neck.out_channels = config.query_generator.embed_dims = 32
        config.decoder.update(
            embed_dims=32, in_points=4, out_points=8, feedforward_channels=32
        )
        classes = config.decoder.num_classes
    else:
        config.neck.out_channels = 32
        config.bbox_head.update(
            in_channels=32, feat_channels=32, stacked_convs=1
        )
        classes = config.bbox_head.num_classes
    model = build(config).train()
    samples = make_samples((3, 1), classes, [(96, 64), (64, 96)])
    inputs = [
        torch.randint(0, 256, (3, *sample.img_shape), dtype=torch.uint8)
        for sample in samples
    ]
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True
    )
    total, _ = model.parse_losses(model(**data, mode='loss'))
    assert total.isfinite()
    total.backward()
    unused = [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and param.grad is None
    ]
    assert unused == []


def full_backbone(config):
    from lors_plugin.parameternet.backbone import ParameterNet

    options = {k: v for k, v in config.items() if k not in ('type',)}
    with torch.device('meta'):
        model = ParameterNet(**options)
    assert model.out_strides in ((4, 8, 16, 32), (8, 16, 32))
    return model.out_channels
