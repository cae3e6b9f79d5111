import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lors_plugin.lors import LowRankResidualLinear
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
