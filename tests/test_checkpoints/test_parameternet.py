"""Released ParameterNet checkpoints, both ways, with nothing lost."""

import json

import pytest
import torch

from lors_plugin.build import build_model
from lors_plugin.checkpoints import (
    ConversionError,
    guess_source,
    to_lors_plugin,
    to_original,
)
from lors_plugin.testing import Golden, randomize
from lors_plugin.testing.golden_parameternet import classifier_config

SOURCE = 'parameternet'


@pytest.fixture
def released(goldens):
    """Shapes of the released 600M model, without memory."""
    keys = json.loads((goldens / 'keys_parameternet_600m.json').read_text())
    return {
        key: torch.empty(shape, device='meta') for key, shape in keys.items()
    }


@pytest.fixture
def small(goldens):
    return Golden(goldens / 'parameternet_tiny.npz').original_weights()


def test_keys_of_600m(released, build_classifier):
    assert len(released) == 780
    assert guess_source(released) == SOURCE
    converted = to_lors_plugin(released, SOURCE)
    with torch.device('meta'):
        model = build_classifier(
            dict(type='lors_plugin.ParameterNet', arch='600m'), 1824, 1000
        )
    ours = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in converted.items()} == ours
    back = to_original(converted, SOURCE)
    assert {k: v.shape for k, v in back.items()} == {
        k: v.shape for k, v in released.items()
    }


def test_there_and_back(small):
    converted = to_lors_plugin(small, SOURCE)
    assert guess_source(converted) == SOURCE
    back = to_original(converted, SOURCE)
    assert back.keys() == small.keys()
    for key, value in small.items():
        assert torch.equal(back[key], value), key


def test_ghostnet_of_timm(load_config):
    """Outputs are equal; nothing is lost on the way back."""
    timm = pytest.importorskip('timm')
    theirs = randomize(timm.create_model('ghostnet_100')).eval()
    state = theirs.state_dict()
    assert guess_source(state) == SOURCE
    converted = to_lors_plugin(state, SOURCE)
    config = load_config('configs/parameternet/ghostnet-1.0_8xb128_in1k.py')
    ours = build_model(config).eval()
    ours.load_state_dict(converted, strict=True)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = ours.head(ours.extract_feat(images))
        torch.testing.assert_close(found, theirs(images), rtol=1e-4, atol=1e-6)
    back = to_original(converted, SOURCE)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    del state['blocks.3.0.shortcut.2.weight']
    with pytest.raises(ConversionError, match=r'blocks\.3\.0\.shortcut\.2'):
        to_lors_plugin(state, SOURCE)


@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_as_the_backbone_of_a_detector(kind, build, tiny_config, small):
    """Its keys say nothing about the detector around it."""
    decoder = build(tiny_config(kind)['decoder']).state_dict()
    state = {
        f'backbone.{key}' if key.startswith(('stem', 'stages')) else key: v
        for key, v in to_lors_plugin(small, SOURCE).items()
    }
    state.update({f'decoder.{key}': value for key, value in decoder.items()})
    assert guess_source(state) == kind


@pytest.fixture
def build_classifier():
    from mmengine.registry import DefaultScope

    from lors_plugin.registry import MODELS

    def make(backbone, channels, classes):
        golden = dict(
            rows=[[[3, channels, 4, 0, 1]]],
            width=1.0,
            num_classes=classes,
            num_experts=4,
            act='Hardswish',
        )
        config = classifier_config(golden)
        config['backbone'] = backbone
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return MODELS.build(config)

    return make


@pytest.mark.parametrize(
    'key',
    [
        'conv_stem.routing.bias',
        'bn1.running_var',
        'blocks.0.0.ghost1.cheap_operation.0.cond_conv.weight',
        'blocks.1.0.conv_dw.weight',
        'blocks.1.0.bn_dw.bias',
        'blocks.1.0.shortcut.2.routing.weight',
        'blocks.2.1.se.conv_expand.bias',
        'blocks.3.0.conv.cond_conv.weight',
        'conv_head.bias',
        'classifier.weight',
    ],
)
@pytest.mark.parametrize('reverse', [False, True])
def test_missing_keys_are_named(small, key, reverse):
    converter, state = to_lors_plugin, dict(small)
    if reverse:
        converter, state = to_original, to_lors_plugin(small, SOURCE)
        ours = dict(zip(state, small))
        key = next(new for new, old in ours.items() if old == key)
    del state[key]
    with pytest.raises(ConversionError, match=f'1 missing keys: {key}'):
        converter(state, SOURCE)


def test_whole_blocks_are_missed(small):
    state = {k: v for k, v in small.items() if 'blocks.2.0.' not in k}
    with pytest.raises(ConversionError, match='blocks.2.0.ghost1'):
        to_lors_plugin(state, SOURCE)
    state = {k: v for k, v in small.items() if 'shortcut' not in k}
    with pytest.raises(ConversionError, match='blocks.1.0.shortcut.0'):
        to_lors_plugin(state, SOURCE)


def test_unknown_keys_are_named(small):
    small['blocks.0.0.ghost3.weight'] = torch.zeros(1)
    with pytest.raises(ConversionError, match='1 unknown keys: blocks.0.0.gh'):
        to_lors_plugin(small, SOURCE)
