"""Calls that generate their matrices again in backward."""

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    checkpoint_with_sums,
    generated_mixing,
)
from lors_plugin.ops.adaptive_mixing import generated, regenerated

pytestmark = pytest.mark.usefixtures('cpu_program')

B, N, G, P, C, Q, D = 2, 5, 2, 6, 8, 7, 9


def make(bias=True, low_rank=True, queries=N, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(B, queries, G, P, C), (B, queries, D)]
    shapes += [(G * (C * C + Q * P), D), (G * (C * C + Q * P),)]
    if low_rank:
        for rows, cols in ((C, C), (Q, P)):
            shapes += [(G, 2, rows, 3), (B, queries, G, 2, 3, 3)]
            shapes += [(G, 2, 3, cols)]
    tensors = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    if not bias:
        tensors[3] = None
    return tensors


def stage(x, query, weight, bias, *rest):
    *factors, (sums,) = rest
    parts = [LowRank(*factors[i : i + 3]) for i in range(0, len(factors), 3)]
    return generated_mixing(x, query, weight, bias, *parts, gradient_sum=sums)


def stages(tensors, wrap, number=3):
    """Some calls that share a generator, each with the last one's output."""
    sums, (x, *rest) = GradientSum(), tensors
    outs = []
    for _ in range(number):
        outs.append(wrap(stage, x, *rest, sums=(sums,)))
        x = x + outs[-1].mean()
    return torch.cat(outs)


def directly(function, *args, sums):
    return function(*args, sums)


def again(function, *args, sums):
    return checkpoint_with_sums(function, *args, sums=sums, inner=False)


def run(tensors, wrap):
    out = stages(tensors, wrap)
    given = [t for t in tensors if t is not None and t.requires_grad]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
    grads = torch.autograd.grad(out, given, upstream.view_as(out))
    return [out.detach(), *grads]


@pytest.mark.parametrize('low_rank', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_equals_direct_calls(bias, low_rank):
    tensors = make(bias, low_rank)
    for found, wanted in zip(run(tensors, again), run(tensors, directly)):
        assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_in_float64():
    tensors = make(dtype=torch.float64)
    for found, wanted in zip(run(tensors, again), run(tensors, directly)):
        assert_close(found, wanted)


def test_no_query():
    for found, wanted in zip(
        run(make(queries=0), again), run(make(queries=0), directly)
    ):
        assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize('frozen', [0, 1, 3])
def test_what_needs_no_gradient(frozen):
    tensors = make()
    wanted = run(tensors, directly)
    del wanted[frozen + 1]
    tensors[frozen].requires_grad_(False)
    for a, b in zip(run(tensors, again), wanted):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture
def counts(monkeypatch):
    """How often matrices are mixed, and how often generated."""
    counted = dict(mix=0, generate=0)

    def count(module, name):
        function = getattr(module, name)

        def counting(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(regenerated, 'mix')
    count(generated, 'generate')
    return counted


def test_mixes_once_and_generates_twice(counts):
    tensors = make()
    out = stages(tensors, again)
    assert counts == dict(mix=3, generate=3 * G)
    out.sum().backward(retain_graph=True)
    assert counts == dict(mix=3, generate=2 * 3 * G)
    first = [t.grad.clone() for t in tensors]
    out.sum().backward()
    assert counts == dict(mix=3, generate=3 * 3 * G)
    for tensor, grad in zip(tensors, first):
        assert_close(tensor.grad, 2 * grad, atol=1e-5, rtol=1e-4)


def test_two_calls_in_one_function(counts):
    def both(x, *rest):
        return torch.cat([stage(x, *rest), stage(x.flip(1), *rest)])

    def wrap(way):
        return lambda function, *args, sums: way(both, *args, sums=sums)

    tensors = make()
    wanted = run(tensors, wrap(directly))
    for found, one in zip(run(tensors, wrap(again)), wanted):
        assert_close(found, one, atol=2e-5, rtol=1e-4)
    assert counts['mix'] == 2 * 3


def test_results_that_the_function_keeps_are_computed_again(counts):
    def squared(*args):
        return stage(*args).square()

    def keep(function, *args, sums):
        return checkpoint_with_sums(squared, *args, sums=sums)

    def square(function, *args, sums):
        return squared(*args, sums)

    tensors = make()
    for found, wanted in zip(run(tensors, keep), run(tensors, square)):
        assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert counts['mix'] == 0
