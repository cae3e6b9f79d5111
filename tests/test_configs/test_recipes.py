"""Training of the published models: section 4 of the AdaMixer paper."""

import pytest
from mmengine.optim import build_optim_wrapper


def without_scope(config):
    """What MMEngine notes in entries that come from another package."""
    return {k: v for k, v in config.items() if k != '_scope_'}


def test_optimizer(coco_path, read_config):
    wrapper = read_config(coco_path).optim_wrapper
    assert wrapper.optimizer == dict(
        type='AdamW', lr=2.5e-5, weight_decay=1e-4
    )
    assert wrapper.clip_grad == dict(max_norm=1.0, norm_type=2)


def test_schedule(coco_path, read_config):
    config = read_config(coco_path)
    warm_up, steps = map(without_scope, config.param_scheduler)
    assert warm_up == dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=False,
        begin=0,
        end=1000 if 'swin' in coco_path else 500,
    )
    epochs, milestones = 12, [8, 11]
    if coco_path.endswith('-3x_coco.py'):
        epochs = 36
        milestones = [24, 33] if '-crop-' in coco_path else [27, 33]
    assert config.train_cfg.max_epochs == epochs
    assert steps == dict(
        type='MultiStepLR',
        begin=0,
        end=epochs,
        by_epoch=True,
        milestones=milestones,
        gamma=0.1,
    )


def test_losses(coco_path, read_config):
    model = read_config(coco_path).model
    decoder = model.decoder
    weights = (
        decoder.loss_cls.loss_weight,
        decoder.loss_bbox.loss_weight,
        decoder.loss_iou.loss_weight,
    )
    costs = model.train_cfg.assigner.match_costs
    assert weights == (2.0, 5.0, 2.0) == tuple(c.weight for c in costs)


def test_start_of_the_backbone(coco_path, read_config):
    """Weights as the hosts' own configs fetch them."""
    starts = {
        'r50': 'torchvision://resnet50',
        'r101': 'torchvision://resnet101',
        'x101': 'open-mmlab://resnext101_32x4d',
        'swin': (
            'https://github.com/SwinTransformer/storage/releases/download/'
            'v1.0.0/swin_small_patch4_window7_224.pth'
        ),
    }
    (wanted,) = (
        starts[key] for key in starts if f'adamixer_{key}' in coco_path
    )
    backbone = read_config(coco_path).model.backbone
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=wanted)


@pytest.mark.parametrize('kind', ['adamixer', 'lors-adamixer'])
def test_no_decay_of_norms_and_tables_in_swin(
    kind, read_config, narrow_config, build
):
    path = (
        f'configs/{kind.replace("-", "_")}/{kind}_swin-s-p4-w7_300-queries_'
        '8xb2-crop-ms-480-800-3x_coco.py'
    )
    model = build(narrow_config(path))
    wrapper = build_optim_wrapper(model, read_config(path).optim_wrapper)
    decay = {
        id(param): group['weight_decay']
        for group in wrapper.param_groups
        for param in group['params']
    }
    free = {k for k, p in model.named_parameters() if decay[id(p)] == 0}
    tables = [k for k in free if k.endswith('relative_position_bias_table')]
    assert len(tables) == 24
    assert {
        'backbone.patch_embed.norm.weight',
        'backbone.norm3.bias',
        'neck.norm.weight',
        'decoder.stages.0.attention_norm.weight',
    } <= free
    assert all('norm' in k or k in tables for k in free)
    for key, param in model.named_parameters():
        if key not in free:
            assert decay[id(param)] == 1e-4, key
