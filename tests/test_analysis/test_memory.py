"""Bytes for activations, by hand and against real runs."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lors_plugin.analysis import (
    OperatorCounter,
    WeightlessModel,
    count_model,
    make_forward,
)
from lors_plugin.analysis.memory import SavedForBackward


def saved(model, x):
    with SavedForBackward(model) as memory:
        model(x)
    return memory.total


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
