"""Self-attention with box geometry."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.adamixer.self_attention import BoxSelfAttention
from lors_plugin.testing import randomize


def formula(attention, query, overlap):
    """A head a time, softmax written out."""
    batch, number, width = query.shape
    each = width // attention.num_heads
    qkv = query @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = qkv.split(width, -1)
    heads = []
    for h in range(attention.num_heads):
        own = slice(h * each, (h + 1) * each)
        logits = q[..., own] @ k[..., own].transpose(1, 2) / each**0.5
        logits = logits + attention.overlap_scale[h] * (overlap + 1e-7).log()
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., own])
    out = torch.cat(heads, -1)
    return out @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize('number', [1, 5])
def test_equals_the_formula(number):
    attention = randomize(BoxSelfAttention(24, 3).double())
    query = torch.randn(2, number, 24, dtype=torch.float64).requires_grad_()
    overlap = torch.rand(2, number, number, dtype=torch.float64)
    # Boxes apart still have a weight, by the eps of the logarithm.
    overlap[overlap < 0.5] = 0
    attention.overlap_scale.data.mul_(0.1)
    upstream = torch.randn(2, number, 24, dtype=torch.float64)
    inputs = [query, *attention.parameters()]
    results = []
    for function in (attention, lambda *args: formula(attention, *args)):
        out = function(query, overlap)
        grads = torch.autograd.grad(
            out, inputs, upstream, allow_unused=number == 1
        )
        results.append([out.detach(), *(g for g in grads if g is not None)])
    assert_close(*results)


def test_without_overlap_bias_it_is_multihead_attention():
    attention = randomize(BoxSelfAttention(24, 3))
    attention.overlap_scale.data.zero_()
    other = nn.MultiheadAttention(24, 3, batch_first=True)
    other.load_state_dict(
        {
            'in_proj_weight': attention.qkv.weight,
            'in_proj_bias': attention.qkv.bias,
            'out_proj.weight': attention.proj.weight,
            'out_proj.bias': attention.proj.bias,
        }
    )
    query = torch.randn(2, 5, 24)
    out = attention(query, torch.rand(2, 5, 5))
    assert_close(out, other(query, query, query)[0])


def test_a_box_that_nothing_covers_sees_itself():
    """With t = 4 an uncovered pair weighs 1e-28 of a covered one."""
    attention = randomize(BoxSelfAttention(24, 3))
    attention.overlap_scale.data.fill_(4.0)
    query = torch.randn(1, 5, 24)
    out = attention(query, torch.eye(5)[None])
    alone = attention(query.transpose(0, 1), torch.ones(5, 1, 1))
    assert_close(out, alone.transpose(0, 1))


def test_dropout_only_while_training():
    attention = randomize(BoxSelfAttention(24, 3, dropout=0.5))
    query, overlap = torch.randn(1, 9, 24), torch.rand(1, 9, 9)
    assert (attention(query, overlap) != attention(query, overlap)).any()
    attention.eval()
    assert_close(attention(query, overlap), attention(query, overlap))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close(dtype):
    attention = randomize(BoxSelfAttention(24, 3))
    query, overlap = torch.randn(2, 5, 24), torch.eye(5).repeat(2, 1, 1)
    with torch.autocast('cpu', dtype):
        low = attention(query, overlap)
    wanted = attention(query, overlap)
    assert low.isfinite().all()
    assert (low - wanted).norm() < 0.02 * wanted.norm()


def test_init():
    attention = BoxSelfAttention(64, 8)
    attention.init_weights()
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < attention.qkv.weight.abs().max() <= bound
    assert not attention.qkv.bias.any()
    assert not attention.proj.bias.any()
    draws = torch.cat([a.overlap_scale.detach() for a in fresh(20)])
    assert draws.min() >= 0
    assert draws.max() <= 4
    assert 1.6 < draws.mean() < 2.4


def fresh(number):
    for _ in range(number):
        attention = BoxSelfAttention(8, 8)
        attention.init_weights()
        yield attention
