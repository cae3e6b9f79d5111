"""The gradient of a shared weight, added up along the calls."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    generated_mixing,
    low_rank_linear,
)

aten = torch.ops.aten
B, N, G, P, C, Q, D = 2, 3, 2, 4, 6, 5, 8


def mixing(sums):
    """Three calls, each on the result of the one before."""
    torch.manual_seed(0)
    x = torch.randn(B, N, G, P, C, dtype=torch.float64, requires_grad=True)
    query = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(G * (C * C + Q * P), D, dtype=torch.float64)
    weight.requires_grad_()
    bias = torch.randn(len(weight), dtype=torch.float64, requires_grad=True)
    low = LowRank(
        torch.randn(G, 1, C, 2).double(),
        torch.randn(B, N, G, 1, 2, 2).double(),
        torch.randn(G, 1, 2, C).double(),
    )
    outs, state = [], query
    for _ in range(3):
        out = generated_mixing(x, state, weight, bias, low, gradient_sum=sums)
        state = state + out.flatten(2)[..., :D].sin()
        outs.append(out)
    return outs, [weight, x, query, bias]


def linear(sums):
    torch.manual_seed(0)
    shapes = (2, 4, 6), (6, 6), (2, 6), (6, 2), (6,)
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    x, weight, down, up, bias = [t.requires_grad_() for t in tensors]
    outs, state = [], x
    for _ in range(3):
        out = low_rank_linear(state, weight, down, up, bias, sums)
        state = out.sin()
        outs.append(out)
    return outs, [weight, x, down, up, bias]


@pytest.fixture(params=[mixing, linear], ids=lambda f: f.__name__)
def calls(request):
    """Make calls with or without a sum: results, weight and others."""
    return request.param


def total(outs, used):
    return sum(outs[i].square().sum() for i in used)


@pytest.mark.parametrize('used', [(0, 1, 2), (2,), (0,), (0, 2)])
def test_gradients_are_those_of_autograd(calls, used):
    """Also where results of some calls are not used."""
    wanted_outs, leaves = calls(None)
    wanted = torch.autograd.grad(total(wanted_outs, used), leaves)
    outs, leaves = calls(GradientSum())
    assert_close(outs, wanted_outs)
    have = torch.autograd.grad(total(outs, used), leaves)
    assert_close(have, wanted)


class Made(TorchDispatchMode):
    """Counts fresh tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = func.overloadpacket in (aten.mm, aten.new_empty, aten.add)
        self.count += fresh and out.shape == self.shape
        return out


def test_one_gradient_is_made(calls):
    outs, leaves = calls(GradientSum())
    with Made(leaves[0].shape) as made:
        total(outs, (0, 1, 2)).backward()
    assert made.count == 1


def test_autograd_makes_one_for_each_call():
    outs, leaves = linear(None)
    with Made(leaves[0].shape) as made:
        total(outs, (0, 1, 2)).backward()
    assert made.count >= 3


def test_backward_twice_and_again(calls):
    outs, leaves = calls(GradientSum())
    loss = total(outs, (0, 1, 2))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves)
    assert_close(second, tuple(kept))
    assert_close(first, tuple(kept))


def test_weight_that_is_used_elsewhere_too(calls):
    def gradient(sums):
        outs, leaves = calls(sums)
        weight = leaves[0]
        loss = total(outs, (0, 1, 2)) + weight.square().sum()
        return torch.autograd.grad(loss, weight)

    assert_close(gradient(GradientSum()), gradient(None))


def test_frozen_weight(calls):
    sums = GradientSum()
    with torch.no_grad():
        calls(sums)
    assert sums.token is None
    assert not GradientSum.fits(torch.zeros(2))
    weight = torch.zeros(2, requires_grad=True)
    assert GradientSum.fits(weight, None, torch.zeros(2))
    assert not GradientSum.fits(weight, torch.zeros(2).double())
