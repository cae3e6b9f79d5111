"""Numbers of parameters, to the last digit."""

import json
import math

import pytest
import torch

from lors_plugin.checkpoints import to_original

ADAMIXER = 'configs/adamixer/adamixer_r50_8xb2-1x_coco.py'
LORS = 'configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'


def count(module):
    return sum(param.numel() for param in module.parameters())


@pytest.fixture
def full_size(load_config, build):
    """A detector of a config without memory for its weights."""

    def make(path, **decoder):
        config = load_config(path).model
        config.decoder.update(decoder)
        with torch.device('meta'):
            return build(config)

    return make


@pytest.mark.parametrize(
    ('path', 'source', 'ours', 'original', 'published'),
    [
        (ADAMIXER, 'adamixer', 134_790_504, 134_844_024, '134.844'),
        (LORS, 'lors', 59_866_472, 59_919_992, '59.920'),
    ],
    ids=['adamixer', 'lors'],
)
def test_detector(path, source, ours, original, published, full_size, goldens):
    """Ours, and everything with a fraction in the original's state dict.

    The latter has the statistics of BN and a constant 100 x 4 besides.
    """
    detector = full_size(path)
    assert count(detector) == ours
    state = to_original(detector.state_dict(), source)
    total = sum(v.numel() for v in state.values() if v.is_floating_point())
    assert total == original
    assert f'{total / 1e6:.3f}' == published
    keys = json.loads((goldens / f'keys_{source}_r50_100q.json').read_text())
    listed = sum(
        math.prod(entry['shape'])
        for key, entry in keys.items()
        if not key.endswith('num_batches_tracked')
    )
    assert listed == original


def test_decoders(full_size):
    adamixer = count(full_size(ADAMIXER).decoder)
    lors = count(full_size(LORS).decoder)
    wide = count(full_size(ADAMIXER, num_groups=2, in_points=64).decoder)
    assert adamixer == 110_272_296
    assert lors == 35_348_264
    assert f'{adamixer / 6e6:.2f}' == '18.38'
    assert f'{lors / 1e6:.2f}' == '35.35'
    assert f'{1 - lors / adamixer:.0%}' == '68%'
    assert f'{1 - lors / wide:.0%}' == '74%'


def test_shared_parts_are_counted_once(full_size):
    mixing = full_size(LORS).decoder.mixing
    shared = count(mixing.generator) + mixing.out_proj.weight.numel()
    assert shared == 257 * 2 * (128**2 + 128 * 64) + 256 * 2 * 128 * 128
    assert count(mixing) - shared < 0.25 * shared


def test_ranks_add_what_they_should(full_size):
    """Four numbers a rank and group of parameters, none without."""
    without = full_size(LORS, adaptive_ranks=0, static_ranks=0).decoder
    mixing = without.mixing
    shared = count(mixing.generator) + mixing.out_proj.weight.numel()
    assert count(mixing) == shared + 6 * 256
    static = full_size(LORS, adaptive_ranks=0, static_ranks=8).decoder
    assert count(static) - count(without) == 6 * 8 * (2 * 128 * 128 + 256)
