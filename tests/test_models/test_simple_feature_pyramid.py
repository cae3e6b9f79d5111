"""ViTDet's neck, level by level."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.adapters import adapters_of, inject_adapters
from lors_plugin.models import SimpleFeaturePyramid
from lors_plugin.testing import randomize


def by_formula(state, feat, scale):
    """A level as section 3 of the paper has it, on plain tensors."""

    def norm(x, name):
        x = x.movedim(1, -1)
        weight, bias = state.pop(f'{name}.weight'), state.pop(f'{name}.bias')
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)
        return x.movedim(-1, 1)

    def grow(x, name):
        # Every cell becomes 2x2 cells by a matrix of its own.
        x = torch.einsum('bihw,iokl->bohkwl', x, state.pop(f'{name}.weight'))
        x = x.flatten(4).flatten(2, 3)
        return x + state.pop(f'{name}.bias')[:, None, None]

    layers = 0
    if scale in (2, 4):
        feat, layers = grow(feat, '0'), 1
    if scale == 4:
        feat, layers = grow(F.gelu(norm(feat, '1')), '3'), 4
    if scale == 0.5:
        feat = feat.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        feat, layers = feat.amax((-1, -3)), 1
    for i, padding in enumerate((0, 1), layers):
        feat = F.conv2d(feat, state.pop(f'{i}.conv.weight'), padding=padding)
        feat = norm(feat, f'{i}.ln')
    assert not state
    return feat


def test_equals_the_formula():
    scales = (4, 2, 1, 0.5)
    neck = randomize(SimpleFeaturePyramid(8, 6))
    first, last = torch.randn(2, 3, 5, 5), torch.randn(2, 8, 4, 6)
    outs = neck([first, last])
    assert len(outs) == neck.num_outs == 4
    for out, level, scale in zip(outs, neck.levels, scales):
        assert out.shape == (2, 6, 4 * scale, 6 * scale)
        wanted = by_formula(level.state_dict(), last, scale)
        assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_coarser_levels_take_every_other_cell():
    neck = randomize(SimpleFeaturePyramid(8, 6, scales=(1,), num_outs=3))
    one, two, three = neck([torch.randn(2, 8, 5, 8)])
    assert_close(two, one[..., ::2, ::2])
    assert_close(three, one[..., ::4, ::4])


@pytest.mark.parametrize(
    'options, field',
    [
        (dict(in_channels=0), 'in_channels=0'),
        (dict(in_channels=6), 'in_channels=6'),
        (dict(out_channels=1.5), 'out_channels=1.5'),
        (dict(scales=[]), 'scales=[]'),
        (dict(scales=2), 'scales=2'),
        (dict(scales=[1, 8]), 'scales=8'),
        (dict(num_outs=3), 'num_outs=3'),
    ],
)
def test_bad_options_are_named(options, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        SimpleFeaturePyramid(**{'in_channels': 8, **options})


@pytest.mark.parametrize('shape', [(2, 8), (2, 6, 4, 4)])
def test_what_is_no_such_map_is_refused(shape):
    with pytest.raises(ValueError, match=r'\(B, 8, H, W\)'):
        SimpleFeaturePyramid(8)([torch.randn(shape)])


ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48)
VITS = {
    'vit': dict(
        type='VisionTransformer', arch=ARCH, img_size=64, out_type='featmap'
    ),
    # Windows of 2x2 tokens in the first layer, all tokens in the second.
    'windowed': dict(
        type='ViTSAM',
        arch=dict(ARCH, global_attn_indexes=[1]),
        img_size=64,
        window_size=2,
        out_channels=0,
    ),
    'dinov3': dict(
        type='TIMMBackbone',
        model_name='vit_small_patch16_dinov3',
        features_only=True,
        out_indices=[-1],
        embed_dim=32,
        depth=2,
        num_heads=2,
    ),
}


@pytest.mark.parametrize('name', VITS)
def test_adapters_of_a_plain_vit_learn_through_it(name, build):
    neck = dict(type='lors_plugin.SimpleFeaturePyramid', in_channels=32)
    parts = build([dict(VITS[name], _scope_='mmpretrain'), neck])
    layers = '.*(ffn.layers.0.0|mlp.fc1)'
    inject_adapters(parts, module='0', targets=layers, hidden_dims=4)
    levels = parts(torch.randn(2, 3, 64, 96))
    assert [level.shape[2:] for level in levels] == [
        (4 * s, 6 * s) for s in (4, 2, 1)
    ] + [(2, 3)]
    sum(level.square().sum() for level in levels).backward()
    missing = {k for k, p in parts.named_parameters() if p.grad is None}
    frozen = {k for k, p in parts.named_parameters() if not p.requires_grad}
    assert missing == frozen and len(adapters_of(parts)) == 2
