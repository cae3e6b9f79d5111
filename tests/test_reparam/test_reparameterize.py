"""Merged equals unmerged, and can be taken back bit for bit."""

import copy

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch import nn

from lors_plugin.adapters import adapters_of, inject_adapters
from lors_plugin.reparam import MergeError, reparameterize, unmerge


def shake(model):
    """Weights that are neither 0 nor 1: fresh ones hide mistakes."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


VIT = dict(type='VisionTransformer', img_size=32, patch_size=16)
ARCH = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
HOSTS = {
    'vit': dict(VIT, arch=ARCH),
    'dinov2': dict(VIT, arch=ARCH, layer_scale_init_value=1e-5),
    'swiglu': dict(VIT, arch=ARCH, layer_cfgs=dict(ffn_type='swiglu_fused')),
    'clip': dict(VIT, arch=ARCH, pre_norm=True),
    'deit': dict(
        VIT, type='DistilledVisionTransformer', arch=ARCH, out_type='raw'
    ),
    'deit3': dict(VIT, type='DeiT3', arch=ARCH),
    'beit': dict(
        VIT,
        type='BEiTViT',
        arch=dict(ARCH, depth=2),
    ),
    'beit-plain-bias': dict(
        VIT, type='BEiTViT', arch=ARCH, layer_cfgs=dict(bias=True)
    ),
    'swin': dict(
        type='SwinTransformer',
        arch=dict(embed_dims=24, depths=[2, 2], num_heads=[2, 4]),
        img_size=40,
        out_indices=(1,),
        window_size=4,
        pad_small_map=True,
    ),
    'swin-mmdet': dict(
        type='mmdet.SwinTransformer',
        embed_dims=24,
        depths=(2, 2),
        num_heads=(2, 4),
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
    ),
    'convnext': dict(
        type='ConvNeXt',
        arch=dict(depths=[1, 1], channels=[16, 24]),
        out_indices=(1,),
    ),
    'convnext-maps': dict(
        type='ConvNeXt',
        arch=dict(depths=[1, 1], channels=[16, 24]),
        out_indices=(1,),
        linear_pw_conv=False,
    ),
}


def build(host):
    import mmdet.models  # noqa: F401
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(HOSTS[host])
    model.eval()
    return model


def output(model, x):
    out = model(x)[-1]
    return out[0] if isinstance(out, (tuple, list)) else out


def error(value, wanted):
    return ((value - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize('host', HOSTS)
@torch.no_grad()
def test_merged_equals_adapted(host):
    model = build(host)
    keys = list(model.state_dict())
    report = inject_adapters(model, '', scale=0.5)
    shake(model)
    side = 40 if 'swin' in host else 32
    x = torch.randn(2, 3, side, side)
    plain = output(build(host), x)
    adapted = output(model, x)
    assert reparameterize(model) == len(report.adapted)
    assert error(output(model, x), adapted) < 1e-5
    assert error(adapted, plain) > 1e-2
    assert list(model.state_dict()) == keys
    build(host).load_state_dict(model.state_dict(), strict=True)
    assert reparameterize(model) == 0
    assert unmerge(model) == len(report.adapted)
    assert torch.equal(output(model, x), adapted)
    assert list(adapters_of(model)) == report.adapted
    assert unmerge(model) == 0


def adapted(layer, **kwargs):
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(layer=layer)).eval()
    inject_adapters(model, '', targets=['layer'], **kwargs)
    return shake(model)


@pytest.mark.parametrize(
    'layer, shape',
    [
        (nn.Linear(8, 5), (3, 8)),
        (nn.Linear(8, 5, bias=False), (3, 8)),
        (nn.Conv2d(8, 5, 1), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, 1, stride=2, bias=False), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, 3), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, (3, 1), padding='valid'), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, 1, padding='same'), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, 3, 1, 1, padding_mode='reflect'), (2, 8, 4, 3)),
        (nn.Conv2d(8, 5, 3, 1, 1, padding_mode='circular'), (2, 8, 4, 3)),
        (Conv2dAdaptivePadding(8, 5, 1, stride=2), (2, 8, 4, 3)),
    ],
)
@pytest.mark.parametrize('groups', [1, 2])
@torch.no_grad()
def test_layers(layer, shape, groups):
    model = adapted(copy.deepcopy(layer), groups=groups, scale=10.0)
    x = torch.randn(shape)
    wanted = model.layer(x)
    reparameterize(model)
    assert error(model.layer(x), wanted) < 2e-6
    assert type(model.layer) is type(layer)
    assert not list(model.layer.children())


@torch.no_grad()
def test_half_precision():
    """As near as rounding the merged weights once allows."""
    model = adapted(nn.Linear(64, 32), scale=0.5)
    x = torch.randn(16, 64)
    wanted = model.layer(x)
    half = copy.deepcopy(model).half()
    reparameterize(half)
    assert half.layer.weight.dtype == torch.float16
    assert error(half.layer(x.half()).float(), wanted) < 5e-3


def test_what_is_trained_stays_trained():
    model = adapted(nn.Linear(8, 5), trainable=[r'layer\.bias'])
    reparameterize(model)
    assert model.layer.bias.requires_grad
    assert not model.layer.weight.requires_grad


class Doubled(nn.Module):
    """A linear layer, twice, which one can do."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Linear(8, 8) if inner is None else inner

    def forward(self, x):
        return 2 * self.inner(x)

    @torch.no_grad()
    def merged(self):
        inner = self.inner
        new = nn.Linear(8, 8, dtype=inner.weight.dtype)
        new.weight.copy_(2 * inner.weight.double())
        new.bias.copy_(2 * inner.bias.double())
        return new


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def adapted_at(model, *targets):
    inject_adapters(model, '', targets=list(targets))
    return shake(model).eval()


@torch.no_grad()
def check(model, number):
    """Merge and back, with outputs compared; the merged model is left."""
    wanted = model(X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert reparameterize(model) == number
    assert reparameterize(model) == 0
    merged = model(X)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    left = [type(m).__name__ for m in model.modules()]
    assert 'Doubled' not in left and 'RepAdapter' not in left
    assert unmerge(model) == number
    assert torch.equal(model(X), wanted)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    reparameterize(model)
    assert torch.equal(model(X), merged)


def test_replaced_at_every_place():
    shared = Doubled()
    model = nn.Sequential(
        shared, nn.Linear(8, 8), nn.Sequential(nn.Tanh(), shared), shared
    ).eval()
    check(model, 1)
    assert model[0] is model[2][1] is model[3]
    assert type(model[0]) is nn.Linear


def test_adapters_merge_before_the_layer_that_holds_them():
    model = nn.Sequential(Doubled(), nn.Linear(8, 8), Doubled())
    check(adapted_at(model, r'[02]\.inner', '1'), 5)
    assert list(model.state_dict()) == [
        f'{i}.{name}' for i in range(3) for name in ('weight', 'bias')
    ]


def test_an_adapter_of_the_replaced_layer_goes_into_the_new_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    adapted_at(model, '0')
    plain = model[0]
    model[0] = Doubled(nn.Linear(8, 8))
    model[0].add_module('rep_adapter', plain.rep_adapter)
    for hook in plain._forward_pre_hooks.values():
        model[0].register_forward_pre_hook(hook, with_kwargs=True)
    check(model.eval(), 2)


def test_replaced_within_replaced():
    class Outer(Doubled):
        pass

    model = nn.Sequential(Outer(Doubled()), nn.Tanh()).eval()
    check(model, 2)
    assert type(model[0]) is nn.Linear


def test_a_shared_layer_that_is_adapted_in_two_parents():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    check(adapted_at(model, '0'), 1)


def test_a_copy_is_unmerged_by_itself():
    model = nn.Sequential(Doubled(), nn.Tanh()).eval()
    wanted = model(X)
    reparameterize(model)
    other = copy.deepcopy(model)
    assert unmerge(other) == 1
    assert torch.equal(other(X), wanted)
    assert type(model[0]) is nn.Linear


def broken(case):
    """A model with an adapter on 0, whose layers 1 and 2 are replaced."""
    model = nn.Sequential(nn.Linear(8, 8), Doubled(), Doubled()).eval()
    adapted_at(model, '0')
    if case == 'train':
        model.train()
    elif case == 'adapter trains':
        model[0].rep_adapter.train()
    elif case == 'adapter nan':
        model[0].rep_adapter.up_bias.data[3] = torch.nan
    elif case == 'adapter overflow':
        model.half()
        model[0].weight.data.fill_(6e4)
        model[0].rep_adapter.scale.fill_(100)
    elif case == 'adapted on meta':
        model[0].to('meta')
    elif case == 'part trains':
        model[2].inner.train()
    elif case == 'nan':
        model[2].inner.weight.data[2, 3] = torch.nan
    elif case == 'overflow':
        model.half()
        model[2].inner.weight.data.fill_(6e4)
    elif case == 'meta':
        model[2].to('meta')
    elif case == 'hook':
        model[2].register_forward_hook(print)
    elif case == 'parametrized':
        nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    'case, match',
    [
        ('train', 'training mode'),
        ('adapter trains', 'training mode'),
        ('adapter nan', r'0\.bias: .*not finite'),
        ('adapter overflow', r'0\.weight: .*not finite in float16'),
        ('adapted on meta', '0: .*meta device'),
        ('part trains', '2 or a part of it is in training mode'),
        ('nan', r'2\.weight: .*not finite'),
        ('overflow', r'2\.weight: .*not finite in float16'),
        ('meta', '2: .*meta device'),
        ('hook', '2: .*print.* would be lost'),
        ('parametrized', '0: its weight is computed from others'),
    ],
)
def test_refused_before_anything_is_changed(case, match):
    model = broken(case)
    modules = list(model.named_modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match=match):
        reparameterize(model)
    assert list(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_a_model_that_would_be_replaced_itself():
    with pytest.raises(MergeError, match=r'Doubled.*model\.merged\(\)'):
        reparameterize(Doubled().eval())
