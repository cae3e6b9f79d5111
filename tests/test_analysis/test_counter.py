"""Where work and parameters are booked."""

import pytest
import torch
from torch import nn

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.self_attention import BoxSelfAttention
from lors_plugin.analysis import OperatorCounter, count_model


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
