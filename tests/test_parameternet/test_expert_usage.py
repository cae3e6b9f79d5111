"""Shares, entropy and variation of experts, against numbers by hand."""

import math

import pytest
import torch
from torch import nn

from lors_plugin.analysis import (
    ExpertUsage,
    LayerUsage,
    collapsed_layers,
    usage_table,
)
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        DynamicConv2d(3, 4, 1, num_experts=3, routing='sigmoid_linear'),
        DynamicConv2d(4, 4, 3, num_experts=2),
        DynamicConv2d(4, 4, 1, num_experts=1),
    )


def test_only_one_expert(model):
    with torch.no_grad():
        model[1].routing.fc.bias.copy_(torch.tensor([0.0, 9.0]))
    with ExpertUsage(model) as usage:
        model(torch.randn(4, 3, 8, 8))
    layers = usage.result()
    assert list(layers) == ['0', '1']
    assert layers['1'].top > 0.99
    assert layers['1'].entropy < 0.05
    assert layers['0'].shares == pytest.approx([1 / 3] * 3, abs=0.02)
    assert collapsed_layers(layers) == ['1']
    assert collapsed_layers(layers, 0.3) == ['0', '1']
    table = usage_table(layers).splitlines()
    assert len(table) == 3
    assert '0.00 1.00' in table[2]


def test_shares_of_images(model):
    """Two batches, weights that do not sum to one."""
    given = torch.tensor([[0.2, 0.2, 0.0], [0.0, 0.8, 0.0], [0.1, 0.1, 0.2]])
    router = model[0].routing
    router.forward = lambda x: given[: len(x)].clone()
    with ExpertUsage(model[0]) as usage:
        model[0](torch.zeros(3, 3, 2, 2))
        model[0](torch.zeros(1, 3, 2, 2))
    (layer,) = usage.result().values()
    shares = torch.tensor(
        [[0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5], [0.5, 0.5, 0]]
    )
    assert layer.shares == pytest.approx(shares.mean(0).tolist(), rel=1e-5)
    deviation = shares.std(0, correction=0).mean().item()
    assert layer.variation == pytest.approx(deviation, rel=1e-5)


def test_entropy():
    assert LayerUsage([0.25] * 4, 0.0).entropy == pytest.approx(1)
    assert LayerUsage([1.0, 0.0], 0.0).entropy == 0
    two_of_four = LayerUsage([0.5, 0.5, 0, 0], 0.0).entropy
    assert two_of_four == pytest.approx(math.log(2) / math.log(4))


def test_nothing_is_left_behind(model):
    with ExpertUsage(model) as usage:
        pass
    model(torch.randn(2, 3, 4, 4))
    assert usage.result() == {}
    assert not model[0].routing._forward_hooks
