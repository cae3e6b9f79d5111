"""The adapter alone: its formula, its layouts, its way out."""

import pytest
import torch

from lors_plugin.adapters import RepAdapter


def shake(model):
    """Weights that are neither 0 nor 1: fresh ones hide mistakes."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


def adapter(**kwargs):
    torch.manual_seed(0)
    options = dict(embed_dims=12, hidden_dims=6, groups=3, scale=0.7)
    return shake(RepAdapter(**{**options, **kwargs})).eval()


def by_hand(module, x):
    """Section 3.2, one slice of channels after the other."""
    hidden = x @ module.down_weight.T + module.down_bias
    size = hidden.shape[-1] // module.groups
    parts = [
        hidden[..., g * size : (g + 1) * size] @ weight.T
        for g, weight in enumerate(module.up_weight.chunk(module.groups))
    ]
    return x + module.scale * (torch.cat(parts, -1) + module.up_bias)


@pytest.mark.parametrize('groups', [1, 2, 3])
@pytest.mark.parametrize('shape', [(12,), (2, 5, 12), (2, 3, 4, 12), (0, 12)])
def test_tokens(groups, shape):
    module = adapter(groups=groups)
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), by_hand(module, x))


@pytest.mark.parametrize('groups', [1, 3])
def test_maps(groups):
    module = adapter(groups=groups, channel_dim=1)
    x = torch.randn(2, 12, 5, 4)
    wanted = by_hand(module, x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(module(x), wanted)


def test_affine_is_the_adapter():
    module = adapter()
    x = torch.randn(7, 12)
    matrix, offset = module.affine()
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(
        (x.double() @ matrix + offset).float(), module(x)
    )


def test_a_fresh_one_does_nothing_but_learns():
    module = RepAdapter(12)
    x = torch.randn(3, 12)
    assert torch.equal(module.eval()(x), x)
    module.train()(x).square().sum().backward()
    assert module.up_weight.grad.abs().max() > 0


def test_dropout_only_in_training():
    module = adapter(dropout=0.9)
    x = torch.randn(50, 12)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_scale_travels_with_the_weights():
    other = adapter(scale=5.0)
    other.load_state_dict(adapter(scale=0.1).state_dict())
    assert other.scale.item() == pytest.approx(0.1)


def test_counts_of_the_paper():
    """24 adapters of a ViT-B: 0.22 M weights, 0.24 M with biases."""
    module = RepAdapter(768)
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    assert 24 * weights == 221_184
    assert 24 * sum(p.numel() for p in module.parameters()) == 239_808


def test_dtype_of_the_input_stays():
    module = adapter()
    with torch.autocast('cpu', torch.bfloat16):
        assert module(torch.randn(3, 12)).dtype == torch.float32
        half = torch.randn(3, 12).bfloat16()
        assert module(half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'options, match',
    [
        (dict(groups=4), 'hidden_dims=6 must be divisible by groups=4'),
        (dict(embed_dims=10), 'embed_dims=10 must be divisible'),
        (dict(channel_dim=2), 'channel_dim=2'),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(scale=float('nan')), 'scale=nan'),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        adapter(**options)
