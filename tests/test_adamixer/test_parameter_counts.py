"""Numbers of parameters, to the last digit."""

import json
import math

import pytest

from lors_plugin.checkpoints import to_original

ADAMIXER = 'configs/adamixer/adamixer_r50_8xb2-1x_coco.py'
LORS = 'configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'


def count(module):
    return sum(param.numel() for param in module.parameters())


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


def variant(name, kind='adamixer', training='8xb2-crop-ms-480-800-3x'):
    folder = kind.replace('-', '_')
    return f'configs/{folder}/{kind}_{name}_{training}_coco.py'


# Of torchvision's models, without their classifiers.
RESNET50, RESNET101 = 23_508_032, 42_500_160


def resnext101_32x4d():
    """Convolutions, their BatchNorms, and the offsets of DCN, by hand."""
    total, width, before = 64 * 3 * 49 + 2 * 64, 128, 64
    for stage, blocks in enumerate((3, 4, 23, 3)):
        out = 2 * width
        total += before * out + 2 * out  # the shortcut
        for _ in range(blocks):
            total += before * width + width * width // 32 * 9 + width * out
            total += 2 * (width + width + out)
            if stage:
                total += 18 * (width * 9 + 1)
            before = out
        width *= 2
    return total


def swin_small():
    """Patches, blocks, what joins the stages, and a norm an output."""
    total, width = 96 * 3 * 16 + 96 + 2 * 96, 96
    for depth, heads in zip((2, 2, 18, 2), (3, 6, 12, 24)):
        block = 4 * width**2 + 4 * width + heads * 13**2
        block += 8 * width**2 + 5 * width + 2 * 2 * width
        total += depth * block + 2 * width
        if width < 768:
            total += 2 * 4 * width + 4 * width * 2 * width
        width *= 2
    return total


VARIANTS = {
    'r50_300-queries': (RESNET50, 3840),
    'r101_300-queries': (RESNET101, 3840),
    'swin-s-p4-w7_300-queries': (swin_small(), 1440),
    'x101-32x4d-dconv-c3-c5_300-queries': (resnext101_32x4d(), 3840),
}


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        *(('adamixer', name) for name in VARIANTS),
        *(('lors-adamixer', name) for name in list(VARIANTS)[:3]),
    ],
)
def test_variants(kind, name, full_size):
    """Backbone, neck, queries and decoder; ``widths`` enter the neck."""
    backbone, widths = VARIANTS[name]
    detector = full_size(variant(name, kind))
    assert count(detector.backbone) == backbone
    decoder = 110_272_296 if kind == 'adamixer' else 35_348_264
    neck = widths * 256 + 4 * 256 + 2 * 256
    assert count(detector) == backbone + neck + 300 * 256 + decoder


def test_decoders(full_size):
    adamixer = count(full_size(ADAMIXER).decoder)
    lors = count(full_size(LORS).decoder)
    fair = variant('r50-g2-p64', training='8xb2-1x')
    wide = count(full_size(fair).decoder)
    assert wide == 135_536_424
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
