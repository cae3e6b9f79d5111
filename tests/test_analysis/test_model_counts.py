"""Whole detectors: the known figures, and a tiny one by hand."""

import pytest
from mmengine.config import Config

from lors_plugin.analysis import count_config, count_model, make_forward

CONFIGS = dict(
    adamixer='configs/adamixer/adamixer_r50_8xb2-1x_coco.py',
    lors='configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
)


@pytest.fixture(scope='module')
def full_size(request):
    root = request.config.rootpath
    return {
        kind: count_config(Config.fromfile(root / path))
        for kind, path in CONFIGS.items()
    }


def test_known_parameters(full_size):
    totals = {k: v.counts.total.parameters for k, v in full_size.items()}
    decoders = {
        k: v.counts.within('decoder').parameters for k, v in full_size.items()
    }
    assert totals == dict(adamixer=134_790_504, lors=59_866_472)
    assert decoders == dict(adamixer=110_272_296, lors=35_348_264)
    frozen = 64 * 3 * 49 + 128 + 215_808  # the stem and the first stage
    assert full_size['lors'].counts.total.trained == 59_866_472 - frozen


def test_images_are_padded(full_size):
    for result in full_size.values():
        assert result.shape == (800, 1333)
        assert result.padded_shape == (800, 1344)


def test_shared_and_private(full_size):
    lors = full_size['lors'].counts.within('decoder / mixing')
    assert lors.shared == 257 * 2 * (128**2 + 128 * 64) + 256 * 2 * 128 * 128
    decoder = full_size['lors'].counts.within('decoder')
    assert decoder.private == 35_348_264 - lors.shared
    assert full_size['adamixer'].counts.within('decoder').shared == 0


def test_six_stages_of_lors_by_hand(full_size):
    parts = full_size['lors'].counts.parts
    queries, stages = 100, 6
    groups, rank, static = 12, 16, 8  # K 1 1 2 2 3 3

    def of(part):
        return parts[f'decoder / {part}'].multiply_adds

    numbers = 2 * (128 * 128 + 128 * 64)
    generator = stages * queries * 256 * numbers
    assert of('mixing: generator') == generator
    assert f'{generator / stages / 1e9:.2f}' == '1.26'
    products = stages * queries * 2 * (64 * 128**2 + 128 * 64 * 128)
    assert of('mixing: products') == products
    projection = stages * queries * 2 * 128 * 128 * 256
    assert of('mixing: output projection') == projection
    assert f'{projection / stages / 1e9:.2f}' == '0.84'
    low_rank = queries * (
        groups * 256 * 2 * 2 * rank**2  # cores
        + groups * 2 * 64 * (128 * rank + rank * rank + rank * 128)
        + groups * 2 * (rank * rank * 64 + 128 * rank * 64)
        + stages * static * (2 * 128 * 128 + 256)
    )
    assert of('mixing: low rank') == low_rank
    before = generator + products + projection
    assert 0.08 < low_rank / before < 0.12
    assert of('sampling') == stages * queries * (
        256 * 2 * 64 * 3 + 2 * 64 * 128 * 4 * 5
    )
    assert of('attention') == stages * queries * (
        4 * 256**2 + 2 * queries * 256 + queries * 8
    )
    assert of('FFN') == stages * queries * 2 * 256 * 2048
    assert of('branches') == stages * queries * 256 * (2 * 256 + 80 + 4)


def test_neck_by_hand(full_size):
    cells = [(800 // s) * (1344 // s) for s in (4, 8, 16, 32)]
    wanted = sum(
        n * 256 * width for n, width in zip(cells, (256, 512, 1024, 2048))
    )
    assert full_size['lors'].counts.parts['neck'].multiply_adds == wanted


def test_a_tiny_decoder_by_hand(tiny_detector):
    """Everything of the decoder at once, for two images."""
    model = tiny_detector('adamixer')
    counts = count_model(model, make_forward(model, (64, 96), 2))
    queries, width, stages = 7, 32, 3
    groups, points, mixed, channels = 2, 4, 6, 16
    each = (
        width * 3 * width + width * width  # projections of attention
        + 2 * queries * width + queries * 4  # products, and bias of 4 heads
        + width * groups * points * 3  # offsets
        + groups * points * channels * 4 * 5  # 4 levels
        + width * groups * (channels**2 + mixed * points)  # generator
        + groups * (points * channels**2 + mixed * points * channels)
        + groups * mixed * channels * width  # output projection
        + 2 * width * 48  # FFN
        + 2 * width * width + width * (3 + 4)  # branches
    )  # fmt: skip
    assert counts.within('decoder').multiply_adds == (
        2 * stages * queries * each
    )
    assert counts.total.parameters == sum(
        p.numel() for p in model.parameters()
    )


def test_sums():
    from lors_plugin.analysis import ModelCounts, PartCounts

    counts = ModelCounts(
        {
            'decoder / mixing: a': PartCounts(1, 1, 1, 10, 5),
            'decoder / mixing: b': PartCounts(2, 1, 0, 20, 5),
            'decoder / FFN': PartCounts(4, 4, 0, 40, 5),
            'decoders': PartCounts(8, 8, 8, 80, 5),
        }
    )
    assert counts.within('decoder / mixing') == PartCounts(3, 2, 1, 30, 10)
    assert counts.within('decoder').parameters == 7
    assert counts.total == PartCounts(15, 14, 9, 150, 20)
    assert counts.to_dict()['total']['shared'] == 9
