"""Goldens of ParameterNet: stages and logits of a classifier."""

import torch
from mmengine.registry import DefaultScope
from torch import nn

from lors_plugin.checkpoints import to_lors_plugin
from lors_plugin.parameternet.ghost import make_divisible
from lors_plugin.registry import MODELS

from .golden import Errors, Golden, relative_error

ACTIVATIONS = dict(Hardswish='HSwish', ReLU='ReLU')


def classifier_config(config: dict) -> dict:
    """Our config of the classifier that a golden was made with."""
    act_cfg = dict(type=ACTIVATIONS[config['act']])
    rows = config['rows']
    width = config['width']
    backbone = dict(
        type='lors_plugin.ParameterNet',
        arch=dict(rows=rows, width=width),
        num_experts=config['num_experts'],
        act_cfg=act_cfg,
    )
    backbone['out_indices'] = range(len(rows) + 1)
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='StackedLinearClsHead',
            num_classes=config['num_classes'],
            in_channels=make_divisible(rows[-1][-1][1] * width),
            mid_channels=[1280],
            dropout_rate=0.2,
            act_cfg=act_cfg,
        ),
    )


def build_classifier(golden: Golden) -> nn.Module:
    """The classifier of a golden with its weights, converted."""
    original = golden.original_weights()
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(classifier_config(golden.json('config')))
    model.load_state_dict(to_lors_plugin(original, 'parameternet'))
    return model.eval()


def check_parameternet(golden: Golden) -> Errors:
    """Run the classifier in evaluation mode.

    Args:
        golden (Golden): Of kind 'parameternet'.

    Returns:
        dict[str, float]: Largest relative error of every stage and of the
        logits.
    """
    model = build_classifier(golden)
    with torch.no_grad():
        feats = model.backbone(golden.tensor('x'))
        logits = model.head(model.neck(feats))
    values = {f'stage{i}': feat for i, feat in enumerate(feats)}
    values |= {f'stage{i}_mean': x.mean((2, 3)) for i, x in enumerate(feats)}
    values['logits'] = logits
    return {
        name: relative_error(value, golden.tensor(name))
        for name, value in values.items()
        if name in golden
    }
