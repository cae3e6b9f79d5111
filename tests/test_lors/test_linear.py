"""Static LORS: one layer in its place, and all layers of a stack."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lors_plugin.lors import LowRankLinearStack, LowRankResidualLinear
from lors_plugin.testing import randomize


def make_stack(layers=3, rank=2, **kwargs):
    owner = LowRankResidualLinear(6, 5, rank, **kwargs)
    others = [
        LowRankResidualLinear(6, 5, rank, owner=owner, **kwargs)
        for _ in range(layers - 1)
    ]
    return randomize(nn.ModuleList([owner, *others]))


@pytest.mark.parametrize('rank', [0, 2])
@pytest.mark.parametrize('bias', [True, False])
def test_is_a_linear_layer_of_its_full_weight(rank, bias):
    stack = make_stack(rank=rank, bias=bias)
    x = torch.randn(2, 4, 6, requires_grad=True)
    for layer in stack:
        plain = x.detach().clone().requires_grad_()
        weight = layer.weight.detach().clone().requires_grad_()
        wanted = F.linear(plain, weight, layer.bias)
        out = layer(x)
        torch.testing.assert_close(out, wanted)
        upstream = torch.randn_like(out)
        wanted.backward(upstream)
        x.grad = None
        stack.zero_grad()
        out.backward(upstream)
        torch.testing.assert_close(x.grad, plain.grad)
        torch.testing.assert_close(stack[0].shared.grad, weight.grad)
        if rank:
            torch.testing.assert_close(
                layer.down.grad, layer.up.T @ weight.grad
            )
            torch.testing.assert_close(
                layer.up.grad, weight.grad @ layer.down.T
            )


def test_starts_as_one_layer():
    stack = nn.ModuleList([LowRankResidualLinear(6, 5, 2)])
    stack.append(LowRankResidualLinear(6, 5, 2, owner=stack[0]))
    assert torch.equal(stack[0].weight, stack[1].weight)
    assert stack[0].down.abs().min() > 0
    assert not torch.equal(stack[0].down, stack[1].down)
    assert stack[1].bias.abs().max() <= 6**-0.5


def test_shared_weight_is_saved_counted_and_trained_once():
    stack = make_stack()
    names = [name for name, _ in stack.named_parameters()]
    assert names == list(stack.state_dict())
    assert [name for name in names if 'shared' in name] == ['0.shared_weight']
    assert sum(p.numel() for p in stack.parameters()) == 30 + 3 * (22 + 5)


def test_copies_share_a_copy():
    stack = make_stack()
    other = copy.deepcopy(stack)
    assert other[2].shared is other[0].shared_weight
    assert other[2].shared is not stack[0].shared_weight
    with torch.no_grad():
        other[0].shared_weight.zero_()
    assert stack[2].shared.abs().max() > 0


@pytest.mark.parametrize('change', [nn.Module.double, nn.Module.half])
def test_sharing_survives_other_types(change):
    stack = make_stack(device='meta')
    stack.to_empty(device='cpu')
    change(stack)
    assert stack[1].shared is stack[0].shared_weight
    assert stack[1].weight.dtype == stack[0].down.dtype


def test_loading_by_assignment_keeps_sharing():
    stack, other = make_stack(), randomize(make_stack(), 1)
    stack.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 6)
    assert torch.equal(stack[2](x), other[2](x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('rank', [0, 2])
def test_merged(rank, dtype):
    stack = make_stack(rank=rank).to(dtype).eval()
    stack[0].shared_weight.requires_grad_(False)
    for layer in stack:
        plain = layer.merged()
        assert type(plain) is nn.Linear
        assert not plain.training
        assert plain.weight.requires_grad is False
        assert plain.weight.dtype == dtype
        weight = layer.shared.double()
        if rank:
            weight = weight + layer.up.double() @ layer.down.double()
        assert torch.equal(plain.weight, weight.to(dtype))
        assert torch.equal(plain.bias, layer.bias)
        assert plain.bias is not layer.bias


def test_another_shape_cannot_share():
    owner = LowRankResidualLinear(6, 5, 2)
    with pytest.raises(ValueError, match='6 -> 4 cannot share'):
        LowRankResidualLinear(6, 4, 2, owner=owner)


def test_compiles():
    stack = nn.Sequential(*[LowRankResidualLinear(6, 6, 2) for _ in '1'])
    stack.append(LowRankResidualLinear(6, 6, 2, owner=stack[0]))
    randomize(stack)
    compiled = torch.compile(stack, fullgraph=True, backend='aot_eager')
    x = torch.randn(3, 6)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    stack(x).square().sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in stack.parameters()])


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no_bias'])
def test_linear_stack_is_w_plus_ba(bias):
    stack = LowRankLinearStack(6, 5, 3, [2, 0, 3], [1, 1, 2], bias)
    randomize(stack.double())
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    for layer in range(3):
        weight = stack.weight.clone()
        for row in range(stack.down[layer].shape[0]):
            weight += torch.outer(
                stack.up[layer][:, row], stack.down[layer][row]
            )
        assert_close(stack.layer_weight(layer), weight)
        wanted = x @ weight.T + (stack.bias[layer] if bias else 0)
        assert_close(stack(x, layer), wanted)
    assert [len(down) for down in stack.down] == [2, 0, 6]


def test_fresh_linear_stack_is_one_shared_layer():
    stack = LowRankLinearStack(6, 5, 3, 2, bias=False)
    x = torch.randn(4, 6)
    for layer in (1, 2):
        assert_close(stack(x, layer), stack(x, 0), rtol=0, atol=0)
    randomize(stack)
    assert (stack(x, 1) - stack(x, 0)).abs().max() > 0.01


def test_linear_stack_init():
    stack = LowRankLinearStack(400, 300, 2, 8)
    for param, bound in (
        (stack.weight, 1 / math.sqrt(400)),
        (stack.bias[0], 1 / math.sqrt(400)),
        (stack.down[1], math.sqrt(6 / 400)),
    ):
        assert 0.95 * bound < param.abs().max() <= bound
        assert abs(param.mean()) < 0.1 * bound
    assert not any(up.any() for up in stack.up)


def test_all_parameters_of_a_linear_stack_are_trained():
    """Also without a private part: processes wait for every gradient."""
    stack = LowRankLinearStack(6, 5, 3, [2, 0, 1])
    out = sum(stack(torch.randn(4, 6), layer) for layer in range(3))
    out.sum().backward()
    for name, param in stack.named_parameters():
        assert param.grad is not None or not param.requires_grad, name
        assert param.requires_grad == (param.numel() > 0), name


@pytest.mark.parametrize('with_shared', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_both_modules_compute_the_same(with_shared, dtype):
    """Also the gradients, which several layers add to the shared weight."""
    stack = LowRankLinearStack(6, 5, 3, 2, with_shared=with_shared)
    randomize(stack.to(dtype))
    weight = torch.zeros(5, 6) if stack.weight is None else stack.weight
    layers = make_stack().to(dtype)
    layers[0].shared_weight.data.copy_(weight)
    for i, layer in enumerate(layers):
        for name in ('down', 'up', 'bias'):
            getattr(layer, name).data.copy_(getattr(stack, name)[i])
    x = torch.randn(4, 6, dtype=dtype)
    for i, layer in enumerate(layers):
        assert_close(stack(x, i), layer(x), rtol=2e-2, atol=2e-2)
        stack(x, i).square().sum().backward()
        layer(x).square().sum().backward()
        assert_close(stack.up[i].grad, layer.up.grad, rtol=3e-2, atol=3e-2)
    if with_shared:
        grads = stack.weight.grad, layers[0].shared_weight.grad
        assert_close(*grads, rtol=3e-2, atol=3e-2)


def test_keys_and_their_order():
    """Files and states of optimizers, which go by the order, depend on it."""
    names = ['weight', 'down.0', 'down.1', 'up.0', 'up.1', 'bias.0', 'bias.1']
    assert list(LowRankLinearStack(6, 5, 2, 1).state_dict()) == names
    keys = [name for name, _ in make_stack(2).named_parameters()]
    private = [f'0.{name}' for name in ('shared_weight', 'down', 'up', 'bias')]
    assert keys == private + [k.replace('0', '1') for k in private[1:]]
