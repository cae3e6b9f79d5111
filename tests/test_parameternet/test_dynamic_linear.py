"""The dynamic linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.dynamic_linear import DynamicLinear
from lors_plugin.testing import randomize


@pytest.mark.parametrize('bias', [True, False])
def test_is_the_pointwise_convolution_of_its_tokens(bias):
    linear = randomize(DynamicLinear(6, 5, bias, 3), 0)
    conv = DynamicConv2d(6, 5, 1, bias=bias, num_experts=3)
    state = linear.state_dict()
    state['weight'] = state['weight'][..., None, None]
    conv.load_state_dict(state)
    x = torch.randn(2, 3, 4, 6)
    wanted = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(linear(x), wanted)
    assert_close(linear(x.flatten(1, 2)), wanted.flatten(1, 2))


def test_without_tokens_each_row_is_an_image():
    linear = randomize(DynamicLinear(6, 5), 0)
    x = torch.randn(3, 6)
    assert_close(linear(x), linear(x[:, None])[:, 0])


def test_one_expert_is_a_plain_layer():
    linear = randomize(DynamicLinear(6, 5, num_experts=1), 0)
    x = torch.randn(2, 3, 6)
    wanted = F.linear(x, linear.weight[0], linear.bias[0])
    assert_close(linear(x), wanted)


@pytest.mark.parametrize('routing', ['softmax_mlp', 'sigmoid_linear'])
def test_starts_with_the_statistics_of_a_plain_layer(routing):
    linear = DynamicLinear(256, 256, num_experts=4, routing=routing)
    x = torch.randn(3, 50, 256)
    plain = nn.Linear(256, 256)
    assert_close(linear(x).std(), plain(x).std(), rtol=0.05, atol=0)


def test_no_experts():
    with pytest.raises(ValueError, match='num_experts=0'):
        DynamicLinear(4, 4, num_experts=0)
