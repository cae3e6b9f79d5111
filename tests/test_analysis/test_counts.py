"""Counts by hand: small networks, the known detectors, bytes of memory."""

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.adamixer import LORSAdaptiveMixing
from lors_plugin.adamixer.self_attention import BoxSelfAttention
from lors_plugin.analysis import (
    ModelCounts,
    OperatorCounter,
    PartCounts,
    WeightlessModel,
    count_config,
    count_model,
    make_forward,
)

CONFIGS = dict(
    adamixer='configs/adamixer/adamixer_r50_8xb2-1x_coco.py',
    lors='configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
)


def run(module, *inputs, **kwargs):
    with torch.no_grad(), OperatorCounter(module) as counter:
        module(*inputs, **kwargs)
    return counter


def test_a_small_network_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    ).eval()
    counter = run(network, torch.rand(2, 3, 8, 8))
    assert counter.multiply_adds == {
        '0.weight': 2 * 64 * 4 * 3 * 9,
        '3.weight': 2 * 64 * 6 * 4,
        '6.weight': 2 * 6 * 10,
    }
    assert {k: v for k, v in counter.elementwise.items() if v} == {
        '1': 2 * 64 * 4,
        '2': 2 * 64 * 4,
        '4': 2 * 6,
    }
    assert not counter.uncounted


def test_box_attention_by_hand():
    batch, queries, width, heads = 2, 5, 8, 4
    module = BoxSelfAttention(width, heads)
    counter = run(
        module,
        torch.rand(batch, queries, width),
        torch.rand(batch, queries, queries),
    )
    pairs = batch * queries**2
    assert counter.multiply_adds == {
        'qkv.weight': batch * queries * width * 3 * width,
        'proj.weight': batch * queries * width * width,
        # Query times key, weights times value, and the bias of each head.
        '': 2 * pairs * width + pairs * heads,
    }


def mixing_counts(backend):
    module = LORSAdaptiveMixing(
        3, 24, 12, 2, 4, 5, 2, [1, 2, 3], 3, backend=backend
    )
    module.init_weights()
    x, query = torch.rand(2, 7, 2, 4, 6), torch.rand(2, 7, 24)
    return run(module, x, query, stage=1), 2 * 7


def test_lors_mixing_by_hand():
    """Stage 1 of three: G 2, P 4, Q 5, C 6, D 24; K 2, r 2; static 3."""
    counter, rows = mixing_counts('auto')
    # Formed, since that is less than factored: r r C + C r C, r r P + Q r P.
    channel = 2 * 2 * 6 + 6 * 2 * 6
    spatial = 2 * 2 * 4 + 5 * 2 * 4
    assert channel < 4 * (6 * 2 + 2 * 2 + 2 * 6)
    assert spatial < 6 * (5 * 2 + 2 * 2 + 2 * 4)
    assert counter.multiply_adds == {
        'generator.weight': rows * 24 * 2 * (36 + 20),
        'core_generators.1.weight': rows * 24 * 2 * (2 * 2 * 4),
        '': rows * 2 * (4 * 6 * 6 + 5 * 4 * 6),
        'low_rank': rows * 2 * 2 * (channel + spatial),
        'out_proj.weight': rows * (2 * 5 * 6) * 24,
        'out_proj.down.1': rows * (2 * 5 * 6) * 3,
        'out_proj.up.1': rows * 3 * 24,
    }


def test_backend_changes_nothing(monkeypatch):
    want = mixing_counts('auto')[0]
    for backend, variable in (
        ('reference', None),
        ('torch', None),
        ('auto', 'reference'),
    ):
        if variable:
            monkeypatch.setenv('LORS_PLUGIN_BACKEND', variable)
        have = mixing_counts(backend)[0]
        assert have.multiply_adds == want.multiply_adds
        assert have.elementwise == want.elementwise
        assert have.model.backend == backend


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.private = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.private(self.shared(self.shared(x)))


def test_what_is_shared():
    model = Repeated()
    counts = count_model(model, lambda: model(torch.rand(3, 4)))
    assert counts.total.shared == counts.total.private == 20
    assert counts.parts['shared'].shared == 20
    assert counts.parts['shared'].multiply_adds == 2 * 3 * 16
    assert counts.parts['private'].shared == 0


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).abs()


def test_what_is_not_counted_is_said():
    counter = run(Spectrum(), torch.rand(8))
    assert list(counter.uncounted) == ['aten::_fft_r2c']


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    model.train()
    model[1].eval()
    count_model(model, lambda: model(torch.rand(3, 2)))
    assert model.training and model[0].training and not model[1].training
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert torch.equal(model[1].running_mean, torch.zeros(2))


def test_an_error_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(RuntimeError):
        run(model, torch.rand(1, 4))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert run(model, torch.rand(1, 2)).multiply_adds


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


def saved(model, x):
    return count_model(model, lambda: model(x)).saved_bytes


def test_saved_for_backward_by_hand():
    """Linear keeps its input, ReLU its output, which is the next input."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert saved(model, torch.rand(5, 8)) == 4 * (5 * 8 + 5 * 16)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert saved(model, torch.rand(5, 8)) == 0


def test_a_tensor_kept_twice_counts_once():
    class Twice(nn.Module):
        def forward(self, x):
            return x * x + (x.flatten() * 2.0).sigmoid().sum()

    x = torch.rand(6, 6, requires_grad=True)
    assert saved(Twice(), x) == 4 * (36 + 36)


def test_checkpointed_parts_keep_their_input():
    class Recomputed(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=False)

    part = nn.Sequential(*[nn.Linear(8, 8), nn.Sigmoid()] * 3)
    x = torch.rand(2, 8, requires_grad=True)
    assert saved(part, x) > saved(Recomputed(part), x)


def test_peak_of_inference_by_hand():
    """Two tensors at a time: what goes in and what comes out."""
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.ReLU())

    def forward():
        return model(torch.rand(7, 10))

    with torch.no_grad(), OperatorCounter(model) as counter:
        forward()
    # The input stays: the caller holds it.
    assert counter.memory.peak == 4 * 7 * (10 + 30 + 30)
    assert counter.memory.now == 0


@pytest.mark.parametrize(
    ('kind', 'with_cp'), [('adamixer', False), ('lors', True)]
)
def test_without_numbers_as_with_numbers(kind, with_cp, tiny_detector):
    """The whole detector: counts and bytes of a real run on the CPU."""
    changes = dict(decoder=dict(with_cp=with_cp))
    model = tiny_detector(kind, **changes)
    want = count_model(model, make_forward(model, (60, 90), 2))
    weightless = WeightlessModel(tiny_detector(kind, **changes))
    with weightless:
        have = count_model(
            weightless.module, make_forward(weightless.module, (60, 90), 2)
        )
    assert have == want
    assert have.saved_bytes > 0 and have.peak_bytes > 0
    assert not have.uncounted


def test_checkpointing_saves_memory(tiny_detector):
    kept = []
    for with_cp in (False, True):
        model = tiny_detector('lors', decoder=dict(with_cp=with_cp))
        counts = count_model(model, make_forward(model, (64, 64)))
        kept.append(counts.saved_bytes)
    assert kept[1] < 0.9 * kept[0]
