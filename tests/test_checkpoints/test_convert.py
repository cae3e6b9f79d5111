"""Conversion of whole state dicts."""

import json

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.checkpoints import (
    ConversionError,
    guess_source,
    to_lors_plugin,
    to_original,
)
from lors_plugin.checkpoints.key_map import CONSTANT_KEY
from lors_plugin.testing import Golden

CONFIGS = dict(
    adamixer='configs/adamixer/adamixer_r50_8xb2-1x_coco.py',
    lors='configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
)
SOURCES = list(CONFIGS)
ORIGINAL = {}


@pytest.fixture(params=SOURCES)
def released(request, goldens):
    """Source and keys, with shapes but no memory, of a released R50."""
    path = goldens / f'keys_{request.param}_r50_100q.json'
    return request.param, {
        key: torch.empty(entry['shape'], device='meta')
        for key, entry in json.loads(path.read_text()).items()
    }


@pytest.fixture
def original(goldens):
    """Weights of a small detector of an original program, to be changed."""

    def make(source):
        if source not in ORIGINAL:
            golden = Golden(goldens / f'{source}_detector_small.npz')
            ORIGINAL[source] = golden.original_weights()
        return dict(ORIGINAL[source])

    return make


@pytest.fixture(params=SOURCES)
def small(request, original):
    """Source and original weights of a small detector."""
    return request.param, original(request.param)


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def test_released_keys_are_exactly_ours(released, load_config, build):
    source, state = released
    assert guess_source(state) == source
    with torch.device('meta'):
        detector = build(load_config(CONFIGS[source]).model)
    converted = to_lors_plugin(state, source)
    assert shapes(converted) == shapes(detector.state_dict())
    assert shapes(to_original(converted, source)) == shapes(state)


def test_round_trip_is_exact(small):
    source, state = small
    assert guess_source(state) == source
    converted = to_lors_plugin(state, source)
    assert guess_source(converted) == source
    back = to_original(converted, source)
    constant = back.pop(CONSTANT_KEY)
    state.pop(CONSTANT_KEY, None)
    assert_close(back, state, rtol=0, atol=0)
    assert_close(constant, torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(20, 1))


def test_round_trip_from_ours(tiny_detector):
    for source in SOURCES:
        state = tiny_detector(source).state_dict()
        back = to_lors_plugin(to_original(state, source), source)
        assert list(back) == list(state)
        assert_close(back, dict(state), rtol=0, atol=0)


def test_stacked_factors_keep_their_groups(original):
    """(G K, rows, r): the groups outside, the parameter groups inside."""
    state = original('lors')
    old = state['roi_head.adaptive_mixing.ml_parameters.2']
    new = to_lors_plugin(state, 'lors')['decoder.mixing.channel_part.left.2']
    assert new.shape == (2, 3, 32, 8)
    assert_close(new[1, 2], old[1 * 3 + 2], rtol=0, atol=0)


def test_constant_positions_are_dropped(small):
    source, state = small
    state[CONSTANT_KEY] = torch.full((20, 4), 7.0)
    assert len(to_lors_plugin(state, source)) == len(state) - 1


def test_unknown_keys_are_all_listed(small):
    source, state = small
    for key in ('backbonex.conv1.weight', 'extra', 'backbone.conv2.weight'):
        state[key] = torch.zeros(1)
    message = (
        '3 unknown keys: backbonex.conv1.weight, extra, backbone.conv2.weight'
    )
    with pytest.raises(ConversionError, match=message):
        to_lors_plugin(state, source)


MISSING = {
    'one_stage': ('roi_head.bbox_head.1.fc_cls.weight',),
    'two': (
        'roi_head.bbox_head.0.iof_tau',
        'roi_head.bbox_head.2.ffn_norm.bias',
    ),
    'bias_everywhere': tuple(
        f'roi_head.bbox_head.{s}.ffn.layers.1.bias' for s in range(3)
    ),
    'weight_everywhere': tuple(
        f'roi_head.bbox_head.{s}.attention.attn.out_proj.weight'
        for s in range(3)
    ),
    'content': ('rpn_head.init_content_features.weight',),
    'norm_of_neck': ('neck.gn_out.bias',),
    'level_of_neck': (
        'neck.lateral_convs.1.conv.weight',
        'neck.lateral_convs.1.conv.bias',
    ),
    'backbone': (
        'backbone.conv1.weight',
        'backbone.layer2.0.downsample.0.weight',
        'backbone.layer3.1.bn2.running_var',
        'backbone.layer4.1.bn1.num_batches_tracked',
    ),
    'block_of_the_backbone': tuple(
        f'backbone.layer3.1.{part}'
        for part in (
            'conv1.weight',
            'bn1.weight',
            'bn1.bias',
            'bn1.running_mean',
            'bn1.running_var',
            'bn1.num_batches_tracked',
            'conv2.weight',
            'bn2.weight',
            'bn2.bias',
            'bn2.running_mean',
            'bn2.running_var',
            'bn2.num_batches_tracked',
        )
    ),
}


@pytest.mark.parametrize('name', MISSING)
def test_missing_keys_are_all_listed(name, small):
    source, state = small
    for key in MISSING[name]:
        del state[key]
    with pytest.raises(ConversionError, match='missing keys') as caught:
        to_lors_plugin(state, source)
    for key in MISSING[name]:
        assert key in str(caught.value)


@pytest.mark.parametrize(
    'part',
    [
        'ml_parameters',
        'sr_parameters',
        'common_parameter_generator',
        'private_parameter_generator',
        'base_out_proj',
        'out_weight_bias',
    ],
)
def test_missing_part_of_lors_mixing(part, original):
    state = {k: v for k, v in original('lors').items() if part not in k}
    with pytest.raises(ConversionError, match=f'missing keys.*{part}'):
        to_lors_plugin(state, 'lors')


def test_stage_that_lacks_everything(small):
    source, state = small
    state = {
        k: v
        for k, v in state.items()
        if not k.startswith('roi_head.bbox_head.1.')
    }
    with pytest.raises(ConversionError, match='bbox_head.1.fc_cls.weight'):
        to_lors_plugin(state, source)


def test_reverse_lists_too(tiny_detector):
    state = dict(tiny_detector().state_dict())
    del state['decoder.stages.1.fc_reg.bias']
    state['decoder.extra'] = torch.zeros(1)
    with pytest.raises(ConversionError) as caught:
        to_original(state, 'lors')
    assert '1 unknown keys: decoder.extra' in str(caught.value)
    assert '1 missing keys: decoder.stages.1.fc_reg.bias' in str(caught.value)


def test_groups_that_do_not_fit_are_named(original):
    state = original('lors')
    key = 'roi_head.adaptive_mixing.ml_parameters.2'
    state[key] = state[key][:5]
    with pytest.raises(ConversionError, match=f'{key} of shape .* 2 groups'):
        to_lors_plugin(state, 'lors')


def test_wrong_source_is_refused(small):
    source, state = small
    other = SOURCES[1 - SOURCES.index(source)]
    with pytest.raises(ConversionError, match='unknown keys'):
        to_lors_plugin(state, other)


def test_other_programs_are_refused():
    state = {'bbox_head.fc.weight': torch.zeros(1)}
    with pytest.raises(ConversionError, match='no program known here'):
        guess_source(state)
    with pytest.raises(ConversionError, match='no program known here'):
        guess_source({})
