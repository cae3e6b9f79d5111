"""The layer alone: what a token gets, who is dropped, what is learned."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lors_plugin.language import SwitchLinear


def layer(experts=4, seed=0, **options):
    torch.manual_seed(seed)
    return SwitchLinear(6, 5, experts, **options)


def by_token(module, x, capacity):
    """The definition, a loop over tokens."""
    counts, rows = [0] * module.num_experts, []
    for token in x.reshape(-1, x.shape[-1]):
        probs = F.linear(token, module.router.weight).softmax(-1)
        i = int(probs.argmax())
        counts[i] += 1
        bias = None if module.bias is None else module.bias[i]
        row = probs[i] * F.linear(token, module.weight[i], bias)
        rows.append(row if counts[i] <= capacity else torch.zeros_like(row))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('factor', [None, 0.5, 1.25, 10.0])
def test_equals_the_loop_over_tokens(bias, factor):
    module = layer(bias=bias, capacity_factor=factor)
    module.router.weight.data.normal_()
    x = torch.randn(2, 7, 6, requires_grad=True)
    grad = torch.randn(2, 7, 5)
    limit = 14 if factor is None else module.capacity(14)
    outs, grads = [], []
    for function in (module, lambda x: by_token(module, x, limit)):
        out = function(x)
        outs.append(out)
        grads.append(torch.autograd.grad(out, [x, *module.parameters()], grad))
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)


def test_one_expert_is_the_plain_layer():
    module = layer(1, bias=True, capacity_factor=1.0)
    x = torch.randn(3, 6)
    plain = F.linear(x, module.weight[0], module.bias[0])
    torch.testing.assert_close(module(x), plain)
    torch.testing.assert_close(module.eval()(x), plain)


def test_equal_experts_are_the_plain_layer_times_the_probability():
    module = layer(4, capacity_factor=None)
    module.weight.data[:] = module.weight.data[0].clone()
    x = torch.randn(9, 6)
    prob = module.route(x).amax(-1, keepdim=True)
    wanted = prob * F.linear(x, module.weight[0])
    torch.testing.assert_close(module(x), wanted)


def send_all_to(module, expert):
    module.router.weight.data.zero_()
    module.router.weight.data[expert] = 1.0


def test_later_tokens_beyond_the_capacity_get_zeros():
    module = layer(4, capacity_factor=1.0)
    send_all_to(module, 2)
    x = torch.rand(8, 6)
    out = module(x)
    assert (out[:2] != 0).any(-1).all() and (out[2:] == 0).all()
    assert float(module.dropped) == 0.75
    assert module.load.tolist() == [0, 0, 1, 0]
    assert (module.eval()(x) != 0).any(-1).all()
    assert float(module.dropped) == 0


@pytest.mark.parametrize('factor', [None, 1.0])
def test_unused_experts_have_gradients_of_zeros(factor):
    module = layer(3, bias=True, capacity_factor=factor)
    send_all_to(module, 1)
    module(torch.rand(4, 6)).sum().backward()
    for param in (module.weight, module.bias):
        assert (param.grad[[0, 2]] == 0).all() and param.grad[1].any()


def test_balance_loss_by_its_formula():
    module = layer(3)
    x = torch.randn(50, 6)
    module(x)
    probs = module.route(x)
    share = F.one_hot(probs.argmax(-1), 3).float().mean(0)
    wanted = 3 * (share * probs.mean(0)).sum()
    torch.testing.assert_close(module.aux_loss, wanted)
    torch.testing.assert_close(module.load, share)
    module.aux_loss.backward()
    assert module.router.weight.grad.any()


def test_balance_loss_is_one_at_least_when_collapsed():
    module = layer(4)
    module.router.weight.data.zero_()
    module(torch.randn(20, 6))
    torch.testing.assert_close(module.aux_loss, torch.tensor(1.0))
    module.router.weight.data[0] = 50.0
    module(torch.rand(20, 6) + 0.1)
    assert float(module.aux_loss) > 3.9


@pytest.mark.parametrize('factor', [None, 0.5, 2.0])
def test_padding_changes_nothing_for_the_others(factor):
    module = layer(capacity_factor=factor)
    module.router.weight.data.normal_()
    x = torch.randn(1, 6, 6)
    wanted = module(x)
    loss, load = module.aux_loss, module.load
    if factor is not None:  # the same number of places for more tokens
        module.capacity_factor = factor / 2
    module.token_mask = torch.arange(12)[None] >= 6
    out = module(torch.cat([torch.randn(1, 6, 6), x], dim=1))
    torch.testing.assert_close(out[:, 6:], wanted)
    assert (out[:, :6] == 0).all()
    torch.testing.assert_close(module.aux_loss, loss)
    torch.testing.assert_close(module.load, load)


def test_a_mask_of_cached_tokens_is_cut():
    module = layer()
    module.token_mask = torch.ones(2, 9, dtype=torch.bool)
    module.token_mask[1, -1] = False
    out = module(torch.randn(2, 1, 6))
    assert out[0].any() and not out[1].any()


@pytest.mark.parametrize('training', [True, False])
def test_no_tokens(training):
    module = layer().train(training)
    out = module(torch.randn(2, 0, 6))
    assert out.shape == (2, 0, 5)
    assert float(module.aux_loss) == 0
    assert module.load.tolist() == [0] * 4


def test_bfloat16_routes_in_float32():
    module = layer(capacity_factor=2.0)
    x = torch.randn(30, 6)
    half = copy.deepcopy(module).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.aux_loss.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        out = module(x)
        load = module.load
    assert out.dtype == torch.bfloat16
    wanted = module(x)
    torch.testing.assert_close(load, module.load)  # the same choices
    torch.testing.assert_close(out.float(), wanted, atol=0.03, rtol=0.05)
    (out.float().sum() + module.aux_loss).backward()
    assert module.weight.grad.dtype == torch.float32


def test_jitter_in_training_only():
    module = layer(jitter=0.5)
    x = torch.randn(9, 6)
    assert not torch.equal(module.route(x), module.route(x))
    module.eval()
    assert torch.equal(module.route(x), module.route(x))


@pytest.mark.parametrize(
    'options',
    [
        dict(num_experts=0),
        dict(capacity_factor=0.0),
        dict(eval_capacity_factor=-1.0),
        dict(jitter=1.0),
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SwitchLinear(4, 4, **options)
