"""DeiT-Tiny with shared weights: sizes and training of the LORS paper."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from lors_plugin.registry import MODELS

FOLDER = 'configs/lors_vit'
PLAIN = f'{FOLDER}/deit-tiny-p16_8xb128-300e_cifar100.py'
LORS = f'{FOLDER}/lors-deit-tiny-p16_8xb128-300e_cifar100.py'
SMALL_PLAIN = f'{FOLDER}/deit-tiny-p4-32px_8xb128-300e_cifar100.py'
SMALL_LORS = f'{FOLDER}/lors-deit-tiny-p4-32px_8xb128-300e_cifar100.py'


@pytest.mark.parametrize(
    ('path', 'blocks', 'whole'),
    [
        (PLAIN, 5308416, 5543716),
        (LORS, 2506752, 2742052),
        (SMALL_PLAIN, 5308416, 5405476),
        (SMALL_LORS, 2506752, 2603812),
    ],
)
def test_weights_of_the_blocks(path, blocks, whole, full_size):
    """5.31 M and 2.51 M in the paper."""
    model = full_size(path)
    layers = model.backbone.layers
    assert sum(p.numel() for p in layers.parameters() if p.ndim > 1) == blocks
    assert sum(p.numel() for p in model.parameters()) == whole


@pytest.mark.parametrize('path', [LORS, SMALL_LORS])
def test_ranks(path, full_size):
    layers = full_size(path).backbone.layers
    attn = [32] * 9 + [64, 128, 192]
    assert [layer.attn.qkv.rank for layer in layers] == attn
    assert [layer.attn.proj.rank for layer in layers] == attn
    assert [layer.ffn.layers[0][0].rank for layer in layers] == (
        [192, 128, 64] + [32] * 9
    )
    assert [layer.ffn.layers[1].rank for layer in layers] == (
        [192, 128, 64] + [32] * 9
    )


@pytest.mark.parametrize('path', [SMALL_PLAIN, SMALL_LORS])
def test_images_are_not_enlarged(path, read_config):
    config = read_config(path)
    steps = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert steps == ['RandomFlip', 'PackInputs']
    for loader in (config.val_dataloader, config.test_dataloader):
        assert [s.type for s in loader.dataset.pipeline] == ['PackInputs']
    backbone = config.model.backbone
    backbone = backbone.get('module', backbone)
    assert (backbone.img_size, backbone.patch_size) == (56, 4)
    # The rate ends at a hundredth of where it starts.
    assert config.param_scheduler[1].eta_min == 1e-5


@pytest.mark.parametrize('path', [PLAIN, LORS, SMALL_PLAIN, SMALL_LORS])
def test_recipe(path, read_config):
    config = read_config(path)
    assert config.train_cfg.max_epochs == 300
    assert config.train_dataloader.batch_size * 8 == 1024
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('AdamW', 1e-3)
    assert optimizer.weight_decay == 0.05
    warm_up, cosine = config.param_scheduler
    assert (warm_up.type, warm_up.end) == ('LinearLR', 20)
    assert (cosine.type, cosine.begin) == ('CosineAnnealingLR', 20)
    mixup, cutmix = config.model.train_cfg.augments
    assert (mixup.type, mixup.alpha) == ('Mixup', 0.8)
    assert (cutmix.type, cutmix.alpha) == ('CutMix', 1.0)
    assert config.model.head.loss.label_smooth_val == 0.1
    assert config.model.head.num_classes == 100
    for loader in (config.train_dataloader, config.test_dataloader):
        assert loader.dataset.type == 'CIFAR100'


def test_trains_a_step(load_config):
    config = load_config(LORS)
    config.model.backbone.module.update(img_size=32)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        from mmpretrain.structures import DataSample

        model = MODELS.build(
            dict(config.model, data_preprocessor=config.data_preprocessor)
        )
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
        model.train()
        data = dict(
            inputs=[torch.randint(0, 256, (3, 32, 32)) for _ in range(4)],
            data_samples=[DataSample().set_gt_label(i) for i in range(4)],
        )
        before = model.backbone.layers[0].attn.qkv.shared_weight.clone()
        losses = model.train_step(data, wrapper)
    assert losses['loss'].isfinite()
    assert not torch.equal(model.backbone.layers[5].attn.qkv.shared, before)
