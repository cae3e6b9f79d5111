"""The gradient of a shared weight, added up along the calls."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    checkpoint_with_sums,
    generated_mixing,
    gradient_sum,
    low_rank_linear,
)

pytestmark = pytest.mark.usefixtures('cpu_program')

aten = torch.ops.aten
B, N, G, P, C, Q, D = 2, 3, 2, 4, 6, 5, 8


def mixing(sums, dtype=torch.float64):
    """Three calls, each on the result of the one before."""
    torch.manual_seed(0)
    shapes = (B, N, G, P, C), (B, N, D), (G * (C * C + Q * P), D)
    x, query, weight = [torch.randn(shape, dtype=dtype) for shape in shapes]
    bias = torch.randn(len(weight), dtype=dtype)
    for leaf in (x, query, weight, bias):
        leaf.requires_grad_()
    low = LowRank(
        torch.randn(G, 1, C, 2).to(dtype),
        torch.randn(B, N, G, 1, 2, 2).to(dtype),
        torch.randn(G, 1, 2, C).to(dtype),
    )
    outs, state = [], query
    for _ in range(3):
        out = generated_mixing(x, state, weight, bias, low, gradient_sum=sums)
        state = state + out.flatten(2)[..., :D].sin()
        outs.append(out)
    return outs, [weight, x, query, bias]


def linear(sums, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (2, 4, 6), (6, 6), (2, 6), (6, 2), (6,)
    tensors = [torch.randn(s, dtype=dtype) for s in shapes]
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
        self.shape, self.storages = shape, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = func.overloadpacket in (aten.mm, aten.new_empty, aten.add)
        if fresh and out.shape == self.shape:
            storage = out.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return out

    @property
    def count(self):
        return len(self.storages)


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


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
def test_backward_twice_and_again(calls, dtype):
    outs, leaves = autocast(calls, dtype, sums := GradientSum())
    loss = total(outs, (0, 1, 2))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves)
    assert_close(second, tuple(kept))
    assert_close(first, tuple(kept))
    assert not sums.products._passes


def autocast(calls, dtype, sums):
    """Calls of float32 weights, in another type if there is one."""
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        return calls(sums, torch.float64 if dtype is None else torch.float32)


def test_factors_of_a_pass_that_stops_are_not_taken_for_another(calls):
    """Half-precision calls leave factors behind, each pass its own."""
    sums = GradientSum()
    outs, leaves = autocast(calls, torch.bfloat16, sums)
    loss = total(outs, (0, 1, 2))
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    # Backward that never comes to the weight.
    torch.autograd.grad(loss, leaves[1:2], retain_graph=True)
    assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), wanted)

    def stop(grad):
        raise ValueError('stopped')

    handle = leaves[1].register_hook(stop)
    with pytest.raises(ValueError, match='stopped'):
        torch.autograd.grad(loss, leaves, retain_graph=True)
    handle.remove()
    assert_close(torch.autograd.grad(loss, leaves), wanted)


def test_calls_of_another_pass_are_missed(calls):
    """Rather than a gradient without them."""
    outs, leaves = autocast(calls, torch.bfloat16, sums := GradientSum())
    sums.products.take = list
    with pytest.raises(RuntimeError, match='checkpoint_with_sums'):
        total(outs, (0, 1, 2)).backward()


def test_calls_that_save_memory_and_others_in_one_chain(calls):
    """Half precision: some add in place, some leave factors."""
    outs, leaves = autocast(calls, torch.bfloat16, GradientSum())
    wanted = torch.autograd.grad(total(outs, (0, 1, 2)), leaves)

    class Mixed(GradientSum):
        asked = 0

        @property
        def products(self):
            self.asked += 1
            return None if self.asked == 2 else self.of_chain

    outs, leaves = autocast(calls, torch.bfloat16, mixed := Mixed())
    found = torch.autograd.grad(total(outs, (0, 1, 2)), leaves)
    assert mixed.asked == 3
    for grad, want in zip(found, wanted):
        assert (grad - want).norm() <= 5e-3 * want.norm()


def mixed_inputs():
    torch.manual_seed(0)
    rows = G * (C * C + Q * P)
    shapes = (B, N, G, P, C), (B, N, D), (rows, D), (rows,)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def gradients_of(ways, sums):
    """Of a call for each way to call."""
    leaves = mixed_inputs()
    outs = [way(sums, *leaves) for way in ways]
    torch.manual_seed(1)
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
    return torch.autograd.grad(outs, leaves, upstream)


def half(sums, *leaves):
    with torch.autocast('cpu', torch.bfloat16):
        return generated_mixing(*leaves, gradient_sum=sums)


def full(sums, *leaves):
    return generated_mixing(*leaves, gradient_sum=sums)


def again(sums, *leaves):
    if sums is None:
        return half(None, *leaves)
    return checkpoint_with_sums(
        lambda *args: half(args[-1][0], *args[:-1]), *leaves, sums=[sums]
    )


@pytest.mark.parametrize(
    'ways',
    [(again, half), (half, again), (again, again), (full, half), (half, full)],
    ids=lambda ways: ' '.join(way.__name__ for way in ways),
)
def test_calls_of_different_kinds_in_one_chain(ways):
    """Recomputed, in half precision, in float32: whoever starts the chain."""
    found = gradients_of(ways, GradientSum())
    wanted = gradients_of(ways, None)
    for grad, want in zip(found, wanted):
        assert (grad - want).norm() <= 1e-2 * want.norm()


def test_tiles_do_not_matter(calls, monkeypatch):
    def gradients():
        outs, leaves = autocast(calls, torch.bfloat16, GradientSum())
        return torch.autograd.grad(total(outs, (0, 1, 2)), leaves)

    wanted = gradients()
    monkeypatch.setattr(gradient_sum, 'TILE', 7)
    assert_close(gradients(), wanted, rtol=1e-2, atol=1e-2)


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
