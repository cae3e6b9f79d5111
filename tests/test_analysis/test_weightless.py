"""Models without memory for their weights."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lors_plugin.analysis import WeightlessModel
from lors_plugin.analysis.weightless import EmptyWeights


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        # As drop path rates are made; on the meta device it would fail.
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer('index', torch.arange(4).flip(0))

    def forward(self, x):
        return self.tied(self.first(x))[:, self.index]


def test_weights_take_no_memory_while_built():
    with EmptyWeights():
        model = Model()
        huge = nn.Linear(10**6, 10**6)
    assert model.rates == [0, 0.5, 1]
    assert all(p.is_meta for p in model.parameters())
    assert not model.index.is_meta
    assert huge.weight.numel() == 10**12
    assert not torch.empty(1).is_meta


def test_runs_as_if_on_a_cpu():
    with EmptyWeights():
        model = Model()
    with WeightlessModel(model) as weightless:
        out = weightless.module(torch.empty(10**7, 4))
        assert out.device.type == 'cpu'
    assert isinstance(out, FakeTensor)
    assert out.shape == (10**7, 4)


def test_parameters_stay_what_they_were():
    model = WeightlessModel(Model()).module
    assert model.tied.weight is model.first.weight
    assert isinstance(model.first.weight, nn.Parameter)
    assert not model.first.bias.requires_grad
    assert [name for name, _ in model.named_buffers()] == ['index']
