"""Keys of backbones, against the backbones of MMDetection."""

import pytest

from lors_plugin.checkpoints import backbone_problems

SWIN = dict(type='SwinTransformer', embed_dims=6, num_heads=(1, 1, 1, 1))
BACKBONES = {
    **{
        f'r{depth}': dict(type='ResNet', depth=depth, base_channels=4)
        for depth in (18, 34, 50, 101, 152)
    },
    'x101-dcn': dict(
        type='ResNeXt',
        depth=101,
        groups=2,
        base_width=4,
        base_channels=4,
        dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    'r50-dcnv2': dict(
        type='ResNet',
        depth=50,
        base_channels=4,
        dcn=dict(type='DCNv2', deform_groups=1),
        stage_with_dcn=(False, False, True, True),
    ),
    'swin-t': dict(SWIN),
    'swin-s': dict(SWIN, depths=(2, 2, 18, 2)),
    'swin-t-positions': dict(SWIN, use_abs_pos_embed=True),
}
cache = {}


@pytest.fixture
def keys_of(build):
    """Keys of a backbone of MMDetection."""

    def make(name):
        if name not in cache:
            cache[name] = list(build(BACKBONES[name]).state_dict())
        return list(cache[name])

    return make


@pytest.fixture(params=BACKBONES)
def keys(request, keys_of):
    return keys_of(request.param)


def test_whole_backbones_have_no_problems(keys):
    kind, unknown, missing = backbone_problems(keys)
    assert kind == ('Swin' if 'norm0.weight' in keys else 'ResNet')
    assert unknown == missing == []


def test_missing_and_unknown_keys_are_found(keys):
    gone = [keys.pop(i) for i in (-3, len(keys) // 2, 7)]
    added = ['fc.bias', 'layers.0.weight']
    _, unknown, missing = backbone_problems(keys + added)
    assert unknown == added
    assert missing == sorted(gone)


def test_files_older_than_the_counter_of_batches(keys_of):
    keys = [
        key
        for key in keys_of('r18')
        if not key.endswith('num_batches_tracked')
    ]
    assert backbone_problems(keys).missing == []


def test_other_kinds_are_left_alone(keys_of):
    norms = [key.replace('bn', 'gn') for key in keys_of('r18')]
    for keys in (norms, ['conv1.conv.weight'], []):
        assert backbone_problems(keys) == (None, [], [])
