"""Shared weights under autocast on a CPU: cast and added up by hand."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.ops import (
    GradientSum,
    LowRank,
    adaptive_mixing,
    generated_mixing,
    low_rank_linear,
)
from lors_plugin.ops.adaptive_mixing import low_precision

B, N, G, P, C, Q, D, CALLS = 2, 7, 2, 5, 24, 9, 16, 3
DTYPES = [torch.bfloat16, torch.float16]


def draw(*shape, gain=1.0, gaps=False):
    values = gain * torch.randn(shape)
    if gaps and values.dim() > 1:
        values = values.mT.contiguous().mT
    return values.requires_grad_()


def mixing_inputs(queries=N, sides=True, bias=True, gaps=False):
    rows = G * (C * C + Q * P)
    torch.manual_seed(0)
    inputs = dict(
        x=draw(B, queries, G, P, C, gaps=gaps),
        query=draw(B, queries, D, gaps=gaps),
        weight=draw(rows, D, gain=0.2, gaps=gaps),
    )
    if bias:
        inputs['bias'] = draw(rows, gain=0.2)
    if sides:
        for name, i, j in (('channel', C, C), ('spatial', Q, P)):
            inputs[f'{name}_left'] = draw(G, 2, i, 3, gaps=gaps)
            inputs[f'{name}_core'] = draw(B, queries, G, 2, 3, 3, gain=0.2)
            inputs[f'{name}_right'] = draw(G, 2, 3, j, gaps=gaps)
    return inputs


def mixing_calls(inputs, ours, sums=None):
    """Three calls, each with what the one before gave."""
    t, state, outs = inputs, inputs['query'], []
    parts = [
        LowRank(*(t[f'{name}_{kind}'] for kind in LowRank._fields))
        if f'{name}_left' in t
        else None
        for name in ('channel', 'spatial')
    ]
    for _ in range(CALLS):
        if ours:
            out = generated_mixing(
                t['x'],
                state,
                t['weight'],
                t.get('bias'),
                *parts,
                backend='torch',
                gradient_sum=sums,
            )
        else:
            weights = F.linear(state, t['weight'], t.get('bias'))
            weights = weights.unflatten(-1, (G, -1))
            out = adaptive_mixing(t['x'], weights, *parts, backend='reference')
        # A little, or kinks would make other numbers of rounding errors.
        state = state + 0.05 * out.flatten(2)[..., :D]
        outs.append(out)
    return outs


def linear_inputs(queries=N, bias=True, gaps=False):
    torch.manual_seed(0)
    width = 2 * D
    inputs = dict(
        x=draw(B, queries, width, gaps=gaps),
        weight=draw(width, width, gain=0.2, gaps=gaps),
        down=draw(3, width, gain=0.2, gaps=gaps),
        up=draw(width, 3, gain=0.2, gaps=gaps),
    )
    if bias:
        inputs['bias'] = draw(width)
    return inputs


def linear_calls(inputs, ours, sums=None):
    x, weight, down, up, *bias = inputs.values()
    outs = []
    for _ in range(CALLS):
        if ours:
            x = low_rank_linear(x, weight, down, up, *bias, gradient_sum=sums)
        else:
            private = F.linear(F.linear(x, down), up)
            x = F.linear(x, weight, *bias) + private
        outs.append(x)
        x = x.relu()
    return outs


KINDS = {
    'mixing': (mixing_inputs, mixing_calls),
    'linear': (linear_inputs, linear_calls),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """Inputs of a shared weight's calls, and the calls."""
    return KINDS[request.param]


def results(kind, dtype, ours, sums=None, double=False, **options):
    inputs = kind[0](**options)
    if double:
        inputs = {
            name: value.detach().double().requires_grad_()
            for name, value in inputs.items()
        }
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        outs = kind[1](inputs, ours, sums)
    torch.manual_seed(1)
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, list(inputs.values()), upstream)
    assert all(g.dtype == t.dtype for g, t in zip(grads, inputs.values()))
    names = [f'out {i}' for i in range(CALLS)] + list(inputs)
    return dict(zip(names, (*outs, *grads)))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('with_sum', [True, False])
@pytest.mark.parametrize('options', [{}, {'bias': False}, {'gaps': True}])
def test_no_further_off_than_autocast(kind, dtype, with_sum, options):
    exact = results(kind, None, False, double=True, **options)
    plain = results(kind, dtype, False, **options)
    sums = GradientSum() if with_sum else None
    found = results(kind, dtype, True, sums, **options)

    def errors(values):
        assert [v.dtype for v in values.values()] == [
            v.dtype for v in plain.values()
        ]
        distance = [(values[k].double() - exact[k]).norm() for k in exact]
        return torch.stack(distance) / torch.stack(
            [value.norm() for value in exact.values()]
        )

    # Which side of a kink a number falls on is chance: one tensor may be
    # further off, but not all together.
    ours, theirs = errors(found), errors(plain)
    assert ours.mean() <= 1.5 * theirs.mean() + 1e-4
    assert (ours <= 4 * theirs + 1e-3).all()


def test_without_low_rank_parts():
    kind = KINDS['mixing']
    plain = results(kind, torch.bfloat16, False, sides=False)
    found = results(kind, torch.bfloat16, True, GradientSum(), sides=False)
    for name, want in plain.items():
        error = (found[name].double() - want.double()).norm()
        assert error <= 0.05 * want.double().norm(), name


@pytest.mark.parametrize('chunk', [1, 7, 100])
def test_chunks_do_not_matter(kind, chunk, monkeypatch):
    wanted = results(kind, torch.bfloat16, True, GradientSum())
    # The function has the name of its module.
    for module in (low_precision, sys.modules[low_rank_linear.__module__]):
        monkeypatch.setattr(module, 'CHUNK', chunk)
    found = results(kind, torch.bfloat16, True, GradientSum())
    assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_no_queries(kind):
    found = results(kind, torch.bfloat16, True, GradientSum(), queries=0)
    assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize('with_sum', [True, False])
def test_each_input_may_be_frozen(kind, with_sum):
    def new_sums():
        return GradientSum() if with_sum else None

    wanted = results(kind, torch.bfloat16, True, new_sums())
    for frozen in kind[0]():
        inputs = kind[0]()
        inputs[frozen].requires_grad_(False)
        sums = new_sums()
        with torch.autocast('cpu', torch.bfloat16):
            outs = kind[1](inputs, True, sums)
        torch.manual_seed(1)
        upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
        leaves = {k: t for k, t in inputs.items() if k != frozen}
        grads = torch.autograd.grad(outs, list(leaves.values()), upstream)
        for name, grad in zip(leaves, grads):
            # A bias whose weight is frozen is summed up in another order.
            error = (grad.double() - wanted[name].double()).norm()
            assert error <= 3e-3 * wanted[name].double().norm(), name


def test_the_weight_is_cast_once_a_pass(kind):
    inputs, sums = kind[0](), GradientSum()
    made, make = [], sums.make

    def counted(key, function):
        return make(key, lambda: made.append(key) or function())

    sums.make = counted
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        kind[1](inputs, True, sums)
    assert made == [torch.bfloat16]


def test_gradient_of_the_weight_is_as_the_weight_lies(kind):
    for sums in (GradientSum(), None):
        grad = results(kind, torch.bfloat16, True, sums)['weight']
        assert sums is None or grad.is_contiguous()


def test_float64_is_left_alone(kind):
    found = results(kind, torch.bfloat16, True, GradientSum(), double=True)
    wanted = results(kind, None, False, double=True)
    assert_close(found, wanted)


def test_second_derivatives_are_refused(kind):
    inputs = kind[0]()
    with torch.autocast('cpu', torch.bfloat16):
        out = kind[1](inputs, True)[-1]
    upstream = torch.ones_like(out).requires_grad_()
    grad = torch.autograd.grad(out, inputs['x'], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad[0].sum().backward()


def test_activation_in_place():
    inputs = linear_inputs()
    with torch.autocast('cpu', torch.bfloat16):
        out = low_rank_linear(*inputs.values()).relu_()
    out.float().sum().backward()
    assert inputs['weight'].grad.isfinite().all()
