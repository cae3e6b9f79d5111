"""Every kind of site: adapted, merged exactly, taken back, or refused."""

import copy
import warnings

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import nn

from lors_plugin.adapters import (
    SiteError,
    adapter_checkpoint,
    adapters_of,
    inject_adapters,
    load_adapter_checkpoint,
    remove_adapters,
)
from lors_plugin.reparam import reparameterize, unmerge
from lors_plugin.testing import randomize


def tokens(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


class Torch(nn.Module):
    """PyTorch's attention with other inputs for each of the three."""

    def __init__(self, same=False, **kwargs):
        super().__init__()
        self.same = same
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, dtype):
        q = tokens(2, 5, 8, dtype=dtype)
        if self.same:
            return self.attn(q, q, q)[0]
        attn = self.attn
        k = tokens(2, 3, attn.kdim, seed=1, dtype=dtype)
        v = tokens(2, 3, attn.vdim, seed=2, dtype=dtype)
        return self.attn(q, value=v, key=k)[0]


class Wrapped(nn.Module):
    """MMCV's attention, which adds positions before it calls PyTorch's."""

    def __init__(self):
        super().__init__()
        self.self_attn = MultiheadAttention(8, 2, batch_first=True)

    def forward(self, dtype):
        return self.self_attn(
            tokens(2, 5, 8, dtype=dtype),
            query_pos=tokens(2, 5, 8, seed=1, dtype=dtype),
            key=tokens(2, 4, 8, seed=2, dtype=dtype),
            key_pos=tokens(2, 4, 8, seed=3, dtype=dtype),
        )


class Separate(nn.Module):
    """Three layers with other inputs and a use of its own for the first."""

    def __init__(self, key_bias=True):
        super().__init__()
        self.q_proj = nn.Linear(8, 12)
        self.k_proj = nn.Linear(8, 12, bias=key_bias)
        self.v_proj = nn.Linear(8, 12)

    def forward(self, x, memory):
        q, k = self.q_proj(x), self.k_proj(memory).roll(1, -1)
        # Rotated keys, as with rotary positions: their bias counts.
        k = k * torch.linspace(0.5, 1.5, k.shape[1])[:, None].to(k)
        weights = (q @ k.transpose(1, 2)).softmax(-1)
        return weights @ self.v_proj(memory) + x.sum(-1, keepdim=True)


class Outer(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = Separate(**kwargs)

    def forward(self, dtype):
        x = tokens(2, 5, 8, dtype=dtype)
        return self.attn(x, tokens(2, 4, 8, seed=1, dtype=dtype))


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        # With this package, also where MMCV has no compiled operators.
        from mmcv.ops import MultiScaleDeformableAttention

        self.attn = MultiScaleDeformableAttention(
            8, num_heads=2, num_levels=1, num_points=2, batch_first=True
        )

    def forward(self, dtype):
        return self.attn(
            tokens(1, 5, 8, dtype=dtype),
            value=tokens(1, 12, 8, seed=1, dtype=dtype),
            key_padding_mask=torch.arange(12)[None] > 9,
            reference_points=torch.full((1, 5, 1, 2), 0.4, dtype=dtype),
            spatial_shapes=torch.tensor([[3, 4]]),
            level_start_index=torch.tensor([0]),
        )


class Maps(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, **kwargs)

    def forward(self, dtype):
        return self.conv(tokens(2, 8, 7, 6, dtype=dtype))


# Model, targets, method, and how many modules merge.
CASES = dict(
    self_attention=(lambda: Torch(same=True), 'attn', 'rep_adapter', 1),
    no_bias=(lambda: Torch(bias=False), 'attn', 'rep_adapter', 1),
    bias_kv=(lambda: Torch(add_bias_kv=True), 'attn', 'rep_adapter', 1),
    query=(Torch, ('attn', 'q'), 'rep_adapter', 1),
    key=(Torch, ('attn', 'k'), 'rep_adapter', 1),
    key_value=(Torch, [('attn', 'kv')], 'rep_adapter', 1),
    other_widths=(
        lambda: Torch(kdim=6, vdim=6), ('attn', 'kv'), 'rep_adapter', 1,
    ),
    other_widths_query=(
        lambda: Torch(kdim=6, vdim=4), ('attn', 'q'), 'rep_adapter', 1,
    ),
    wrapped=(Wrapped, 'self_attn', 'rep_adapter', 1),
    wrapped_value=(Wrapped, (r'self_attn\.attn', 'v'), 'rep_adapter', 1),
    separate=(Outer, 'attn', 'rep_adapter', 1),
    separate_value=(Outer, ('attn', 'v'), 'rep_adapter', 1),
    separate_no_key_bias=(
        lambda: Outer(key_bias=False), 'attn', 'rep_adapter', 1,
    ),
    deformable=(
        Deformable,
        [r'attn\.(value_proj|output_proj|sampling_offsets)'],
        'rep_adapter', 3,
    ),
    pointwise=(
        lambda: Maps(kernel_size=1, stride=2), 'conv', 'rep_adapter', 1,
    ),
    kernel=(
        lambda: Maps(kernel_size=3, dilation=2), 'conv', 'rep_adapter', 1,
    ),
    reflected=(
        lambda: Maps(kernel_size=3, padding=1, padding_mode='reflect'),
        'conv', 'rep_adapter', 1,
    ),
    lora_separate=(Outer, 'attn', 'lora', 3),
    lora_pair=(Outer, ('attn', 'qv'), 'lora', 2),
    lora_deformable=(Deformable, r'attn\.value_proj', 'lora', 1),
    lora_padding=(
        lambda: Maps(kernel_size=3, padding=1, stride=2), 'conv', 'lora', 1,
    ),
    lora_circular=(
        lambda: Maps(kernel_size=3, padding=1, padding_mode='circular'),
        'conv', 'lora', 1,
    ),
)  # fmt: skip


@pytest.fixture
def adapted():
    """A model with random adapters, and the same without them."""

    def make(name, dtype=torch.float32):
        torch.manual_seed(0)
        build, targets, method, count = CASES[name]
        base = randomize(build()).to(dtype).eval()
        model = copy.deepcopy(base)
        options = dict(dropout=0.3)
        if method == 'rep_adapter':
            options.update(hidden_dims=4, scale=0.5)
        else:
            options.update(rank=3, alpha=2.0)
        report = inject_adapters(
            model, '', targets=targets, method=method, **options
        )
        assert len(report.adapted) == count
        for adapter in adapters_of(model).values():
            randomize(adapter, 1).scale.fill_(0.7)
        return model, base

    return make


def gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_merging_is_exact_and_undone(adapted, name):
    model, base = adapted(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        before = model(torch.float32)
        file = adapter_checkpoint(model)
        remove_adapters(model)
        plain = model(torch.float32)
        load_adapter_checkpoint(model, file)
        model.eval()
        assert torch.equal(model(torch.float32), before)
        assert gap(plain, base(torch.float32)) < 1e-6
        assert gap(before, plain) > 1e-2
        count = reparameterize(model)
        assert count == CASES[name][3]
        assert gap(model(torch.float32), before) < 1e-5
        assert not adapters_of(model)
        assert unmerge(model) == count
        assert torch.equal(model(torch.float32), before)
        remove_adapters(model)
        assert torch.equal(model(torch.float32), plain)
    assert not any(
        module._forward_pre_hooks or module._forward_hooks
        for module in model.modules()
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    'name', ['self_attention', 'key_value', 'separate', 'kernel', 'lora_pair']
)
@torch.no_grad()
def test_half_precision(adapted, name, dtype):
    model, _ = adapted(name, dtype)
    before = model(dtype)
    assert before.dtype == dtype
    reparameterize(model)
    limit = 0.02 if dtype == torch.float16 else 0.1
    assert gap(model(dtype).float(), before.float()) < limit


@pytest.mark.parametrize('name', CASES)
def test_files_and_copies(adapted, name):
    """A copy has its own adapters, and a file puts them on the base."""
    model, base = adapted(name)
    other = copy.deepcopy(model)
    for adapter in adapters_of(model).values():
        for param in adapter.parameters():
            param.data.zero_()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        wanted, plain = other(torch.float32), base(torch.float32)
        assert gap(model(torch.float32), plain) < 1e-6
        assert gap(wanted, plain) > 1e-2
        load_adapter_checkpoint(base, adapter_checkpoint(other))
        assert gap(base.eval()(torch.float32), wanted) < 1e-6


def test_every_adapter_learns(adapted):
    for name in CASES:
        model, _ = adapted(name)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model.train()(torch.float32).square().sum().backward()
        for key, param in model.named_parameters():
            assert (param.grad is not None) == param.requires_grad, (name, key)


@pytest.mark.parametrize(
    ('make', 'target', 'options', 'match'),
    [
        (
            lambda: Torch(kdim=6),
            'attn',
            {},
            r'different numbers of channels .*pair \(pattern, inputs\)',
        ),
        (Torch, ('attn', 'vq'), {}, "letters of 'qkv', in this order"),
        (Torch, r'attn\.out_proj', {}, r'adapt the attention itself \(attn\)'),
        (Torch, 'attn', dict(method='lora'), "method='rep_adapter'"),
        (Outer, (r'attn\.q_proj', 'q'), {}, 'has one input'),
        (
            lambda: Maps(kernel_size=3, padding=1),
            'conv',
            {},
            "zero padding.*method='lora'",
        ),
        (
            lambda: Maps(kernel_size=3, groups=4),
            'conv',
            dict(method='lora'),
            'dense',
        ),
        (Deformable, 'attn', {}, 'such as sampling_offsets in it'),
    ],
)
def test_refused_with_the_reason(make, target, options, match):
    model = make()
    with pytest.raises(SiteError, match=match):
        inject_adapters(model, '', targets=[target], **options)
    assert not adapters_of(model)


def test_one_layer_has_one_choice_of_inputs():
    with pytest.raises(ValueError, match="'q' and 'kv' of attn"):
        inject_adapters(Torch(), '', targets=[('attn', 'q'), ('attn', 'kv')])


def test_torch_transformer_takes_no_short_cut():
    """In evaluation PyTorch's own layers may bypass their attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = randomize(nn.TransformerEncoder(layer, 2)).eval()
    inject_adapters(
        model, '', targets=[r'layers\.\d\.(self_attn|linear1)'], hidden_dims=4
    )
    randomize(model)
    x = tokens(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        assert reparameterize(model) == 4
        assert gap(model(x), before) < 1e-5
