"""A linear layer with a low-rank part against the weight formed."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.ops import low_rank_linear


def make(shape=(2, 3), bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(*shape, 6), (5, 6), (2, 6), (5, 2), (5,) if bias else None]
    return [
        None if s is None else torch.randn(s, dtype=dtype).requires_grad_()
        for s in shapes
    ]


def formed(x, weight, down, up, bias):
    return F.linear(x, weight + up @ down, bias)


def grads_of(function, tensors, upstream):
    given = [t for t in tensors if t is not None and t.requires_grad]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(), (4,), (2, 3), (0,), (2, 0)])
def test_equals_the_formed_weight(shape, bias):
    tensors = make(shape, bias)
    upstream = torch.randn(*shape, 5).double()
    wanted = grads_of(formed, tensors, upstream)
    assert_close(grads_of(low_rank_linear, tensors, upstream), wanted)
    assert torch.autograd.gradcheck(low_rank_linear, tensors)


def test_inputs_and_gradients_with_gaps():
    tensors = make()
    tensors[0] = torch.randn(3, 2, 6).double().transpose(0, 1)
    tensors[0].requires_grad_()
    upstream = torch.randn(3, 2, 5).double().transpose(0, 1)
    wanted = grads_of(formed, tensors, upstream)
    assert_close(grads_of(low_rank_linear, tensors, upstream), wanted)


@pytest.mark.parametrize('shape', [(4,), (2, 3)])
def test_activation_in_place(shape):
    tensors = make(shape)
    upstream = torch.randn(*shape, 5).double()
    wanted = grads_of(lambda *t: formed(*t).relu(), tensors, upstream)
    got = grads_of(lambda *t: low_rank_linear(*t).relu_(), tensors, upstream)
    assert_close(got, wanted)


@pytest.mark.parametrize('index', range(5))
def test_each_input_may_be_frozen(index):
    tensors = make()
    upstream = torch.randn(2, 3, 5).double()
    tensors[index].requires_grad_(False)
    wanted = grads_of(formed, tensors, upstream)
    assert_close(grads_of(low_rank_linear, tensors, upstream), wanted)


def test_autocast():
    tensors = make(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = low_rank_linear(*tensors)
    assert out.dtype == torch.bfloat16
    wanted = formed(*tensors)
    assert (out - wanted).norm() < 2e-2 * wanted.norm()
    out.float().sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_compiles_without_graph_break():
    compiled = torch.compile(
        low_rank_linear, fullgraph=True, backend='aot_eager'
    )
    tensors = make()
    upstream = torch.randn(2, 3, 5).double()
    assert_close(
        grads_of(compiled, tensors, upstream),
        grads_of(low_rank_linear, tensors, upstream),
    )
