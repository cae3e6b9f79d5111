"""Adapters in the hosts' backbones: reached, merged, compiled, recomputed."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lors_plugin.adapters import SiteError, adapters_of, inject_adapters
from lors_plugin.adapters.dry_run import parameters_without_gradient
from lors_plugin.adapters.inject import idle_adapters
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

ARCH = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
VIT = dict(type='VisionTransformer', img_size=32, patch_size=16, arch=ARCH)
SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=24, depths=[2, 2], num_heads=[2, 4]),
    img_size=32,
    window_size=4,
    out_indices=(1,),
)
SWIN2 = dict(
    SWIN,
    type='SwinTransformerV2',
    arch=dict(SWIN['arch'], extra_norm_every_n_blocks=0),
    window_size=[4, 4],
)
HOSTS = dict(
    vit=VIT,
    eva02=dict(VIT, type='ViTEVA02'),
    sam=dict(
        VIT,
        type='ViTSAM',
        arch=dict(ARCH, global_attn_indexes=[1]),
        img_size=80,
        out_channels=8,
        window_size=2,
    ),
    mvit=dict(
        type='MViT',
        arch=dict(
            embed_dims=24, num_layers=2, num_heads=1, downscale_indices=[1]
        ),
        img_size=32,
    ),
    swin=SWIN,
    swin2=SWIN2,
    convnext=dict(
        type='ConvNeXt',
        arch=dict(depths=[1, 2], channels=[16, 24]),
        out_indices=(1,),
    ),
    mmdet=dict(
        type='mmdet.SwinTransformer',
        embed_dims=24,
        depths=(2, 2),
        num_heads=(2, 4),
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
    ),
)
FOUND = dict(
    vit=4, eva02=4, sam=4, mvit=4, swin=8, swin2=4, convnext=3, mmdet=8
)


@pytest.fixture
def adapted():
    """A backbone with random adapters, and images for it."""

    def make(host, dtype=torch.float32, seed=0, options=None, **changes):
        import mmpretrain.models  # noqa: F401
        from mmpretrain.registry import MODELS

        torch.manual_seed(seed)
        model = MODELS.build({**HOSTS[host], **changes}).to(dtype)
        inject_adapters(model, '', dropout=0.0, **(options or {}))
        randomize(model, seed)
        side = HOSTS[host].get('img_size', 32)
        return model, torch.randn(2, 3, side, side, dtype=dtype)

    return make


def output(model, x):
    out = model(x)[-1]
    return out[0] if isinstance(out, (tuple, list)) else out


def gradients(model, x):
    torch.manual_seed(0)
    output(model, x).float().square().mean().backward()
    return {
        name: param.grad
        for name, param in model.named_parameters()
        if param.requires_grad
    }


@pytest.mark.parametrize('host', FOUND)
def test_presets_are_reached_and_merge(adapted, host):
    model, x = adapted(host)
    model.eval()
    assert all(param.grad is None for param in model.parameters())
    grads = gradients(model, x)
    assert len(adapters_of(model)) == FOUND[host]
    assert len(grads) == 4 * FOUND[host]
    for name, grad in grads.items():
        assert grad is not None and grad.abs().max() > 0, name
    with torch.no_grad():
        before = output(model, x)
        reparameterize(model)
        error = (output(model, x) - before).abs().max() / before.abs().max()
    assert error < 1e-5


def test_layers_behind_the_outputs_are_refused(adapted):
    """Those of the second stage, which no output needs."""
    with pytest.raises(SiteError, match=r'on 4 of .*: stages\.1\.blocks\.0'):
        adapted('swin', out_indices=(0,))
    model, _ = adapted(
        'swin', out_indices=(0,), options=dict(exclude='stages.1')
    )
    assert idle_adapters(model) == []


def test_a_refused_model_is_as_it_was():
    from mmpretrain.registry import MODELS

    model = MODELS.build({**HOSTS['swin'], 'out_indices': (0,)})
    model.stages[0].blocks[0].norm1.requires_grad_(False)
    before = {k: p.requires_grad for k, p in model.named_parameters()}
    with pytest.raises(SiteError):
        inject_adapters(model, '')
    assert not adapters_of(model)
    for key, param in model.named_parameters():
        assert param.requires_grad == before[key], key
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_run_without_values():
    class Odd(nn.Module):
        def forward(self, x):
            return x * x.max().item()

    model = nn.Sequential(nn.Linear(32, 4), Odd())
    assert parameters_without_gradient(model, ['0.bias']) is None
    assert parameters_without_gradient(nn.Identity(), []) is None
    assert inject_adapters(model, '', targets=['0']).adapted == ['0']


class Reading(nn.Module):
    """Reads the weights of one layer and calls the other."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.zeros_(self.called.bias)

    def forward(self, x):
        read = nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.called(read.to(self.called.weight.dtype))


class ReadingByHand(nn.Module):
    """A convolution of images whose source does not tell it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)])

    def forward(self, x):
        first, second = self.layers
        return nn.functional.conv2d(first(x), second.weight, second.bias)


def torchvision_swin(version):
    from torchvision.models import swin_transformer

    name = 'SwinTransformerBlock' + ('V2' if version == 2 else '')
    return swin_transformer.SwinTransformer(
        [4, 4],
        8,
        [1, 1],
        [1, 2],
        [4, 4],
        block=getattr(swin_transformer, name),
        downsample_layer=getattr(
            swin_transformer, 'PatchMerging' + ('V2' if version == 2 else '')
        ),
    )


@pytest.mark.parametrize(
    ('make', 'target', 'match'),
    [
        (lambda: torchvision_swin(1), r'.*\.attn\.qkv', 'ShiftedWindowAtt'),
        (lambda: torchvision_swin(1), r'.*\.attn\.proj', 'ShiftedWindowAtt'),
        (lambda: torchvision_swin(2), r'.*\.attn\.qkv', 'ShiftedWindowAtt'),
        (lambda: nn.MultiheadAttention(8, 2), 'out_proj', 'MultiheadAttent'),
        (
            lambda: nn.Transformer(8, 2, 1, 1, 8),
            r'decoder\..*\.multihead_attn\.out_proj',
            'MultiheadAttention reads the weights of out_proj',
        ),
        (Reading, 'read', 'Reading reads the weights of read and never calls'),
        (ReadingByHand, r'layers\.1', r'no output .* on 1 of .*: layers\.1'),
    ],
)
def test_layers_that_are_never_called_are_refused(make, target, match):
    model = make()
    with pytest.raises(SiteError, match=match):
        inject_adapters(model, '', targets=[target], hidden_dims=4)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_beside_them_are_adapted():
    model = torchvision_swin(1)
    targets = [r'.*\.mlp\.0']
    assert len(inject_adapters(model, '', targets).adapted) == 2
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert inject_adapters(model, '', ['linear1']).adapted == ['linear1']
    assert inject_adapters(Reading(), '', ['called']).adapted == ['called']


@pytest.mark.parametrize('attn_cfgs', [dict(), dict(qkv_bias=False)])
@pytest.mark.parametrize('target', ['', r'\.qkv'])
def test_attention_of_swin_v2_is_refused(adapted, attn_cfgs, target):
    """It reads the weights of qkv, so a hook there would never be called."""
    with pytest.raises(SiteError, match='normalises its keys.*FFN only'):
        adapted(
            'swin2',
            options=dict(targets=[rf'stages\.1\..*\.w_msa{target}']),
            stage_cfgs=dict(block_cfgs=dict(attn_cfgs=attn_cfgs)),
        )


@pytest.mark.parametrize('host', ['swin', 'convnext', 'mmdet'])
def test_recomputing_changes_nothing(adapted, host):
    plain = gradients(*adapted(host))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, x = adapted(host, with_cp=True)
        blocks = [m for m in model.modules() if getattr(m, 'with_cp', False)]
        calls = []
        norm = getattr(blocks[-1], 'norm2', None) or blocks[-1].norm
        norm.register_forward_hook(lambda *_: calls.append(1))
        again = gradients(model, x)
    assert len(calls) == 2
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


@pytest.mark.parametrize('host', ['vit', 'convnext'])
def test_compiles_in_one_graph(adapted, host):
    model, x = adapted(host)
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            # The host's NumPy numbers stop the compiler, adapted or not.
            module.drop_prob = float(module.drop_prob)
    wanted = gradients(copy.deepcopy(model), x)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.manual_seed(0)
    output(compiled, x).square().mean().backward()
    for name, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(
                param.grad, wanted[name], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize('host', ['vit', 'mmdet', 'convnext'])
def test_mixed_precision(adapted, host):
    model, x = adapted(host)
    model.eval()
    wanted, full = output(model, x), gradients(model, x)
    full = {name: grad.clone() for name, grad in full.items()}
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        half = output(model, x)
        grads = gradients(model, x)
    assert (half - wanted).abs().max() < 0.05 * wanted.abs().max()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        assert (grad - full[name]).norm() < 0.1 * full[name].norm(), name


@pytest.mark.parametrize('host', ['vit', 'convnext'])
def test_float16(adapted, host):
    half, x = adapted(host, torch.float16)
    kinds = {
        p.dtype for a in adapters_of(half).values() for p in a.parameters()
    }
    assert kinds == {torch.float16}
    half.eval()
    whole, _ = adapted(host)
    whole.load_state_dict(half.state_dict())
    whole.eval()
    out, wanted = output(half, x), output(whole, x.float())
    assert out.dtype == torch.float16
    assert (out - wanted).abs().max() < 0.02 * wanted.abs().max()
