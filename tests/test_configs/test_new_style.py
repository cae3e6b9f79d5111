"""The configs in MMEngine's new style are twins of those beside them."""

import pytest

from lors_plugin.adamixer import LORSAdaMixerDecoder
from lors_plugin.build import build_model, load_config
from lors_plugin.utils import type_name

# Entries that the hosts' base files set to what is the default anyway.
DEFAULTS = ('_scope_', 'backend_args', 'custom_imports')
# Names that registries have for classes.
CLASSES = dict(BN='BatchNorm2d', Pretrained='PretrainedInit')
# Variables of configs, which nothing reads.
VARIABLES = ('backend_args', 'data_root', 'dataset_type', 'vis_backends')


def plain(part):
    """Return a part of a config with names of types in place of classes."""
    if isinstance(part, dict):
        return {
            key: CLASSES.get(type_name(value), type_name(value))
            if key == 'type'
            else plain(value)
            for key, value in part.items()
            if key not in DEFAULTS
        }
    if isinstance(part, (list, tuple)):
        return [plain(item) for item in part]
    return part


@pytest.mark.parametrize('name', ['adamixer', 'lors_adamixer'])
def test_twins(root, name):
    stem = name.replace('_', '-')
    old = load_config(root / f'configs/{name}/{stem}_r50_8xb2-1x_coco.py')
    new = load_config(
        root / f'configs/lors_adamixer/new_style/{name}_r50_8xb2_1x_coco.py'
    )
    ours, theirs = (
        {
            key: value
            for key, value in plain(cfg.to_dict()).items()
            if key not in VARIABLES and not key.endswith('_pipeline')
        }
        for cfg in (new, old)
    )
    assert ours == theirs


def test_the_model_is_built(root):
    path = 'configs/lors_adamixer/new_style/lors_adamixer_r50_8xb2_1x_coco.py'
    options = {
        'model.backbone.depth': 18,
        'model.neck.in_channels': [64, 128, 256, 512],
        'model.decoder.num_stages': 2,
        'model.decoder.feedforward_channels': 64,
    }
    model = build_model(load_config(root / path, options))
    assert type(model.decoder) is LORSAdaMixerDecoder
    assert len(model.decoder.stages) == 2
