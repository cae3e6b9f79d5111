"""Windows and patches for export do what those of the hosts do."""

import pytest
import torch
from torch import nn

from lors_plugin.export.patches import (
    ExportPadding,
    ExportPatchEmbed,
    ExportPatchMerging,
    Grid,
)
from lors_plugin.export.windows import (
    ExportShiftWindows,
    replace_windows,
    smallest_shape,
)

# isort: split
# After this package, which makes mmcv.ops importable.
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmcv.cnn.bricks.transformer import PatchEmbed as MMCVPatchEmbed
from mmcv.cnn.bricks.transformer import PatchMerging as MMCVPatchMerging
from mmdet.models.backbones.swin import ShiftWindowMSA as MMDetShiftWindowMSA
from mmdet.models.layers import AdaptivePadding as MMDetAdaptivePadding
from mmdet.models.layers import PatchMerging as MMDetPatchMerging
from mmpretrain.models import SwinTransformer
from mmpretrain.models.utils import PatchMerging, ShiftWindowMSA

SIZES = [(4, 4), (8, 8), (8, 4), (4, 9), (5, 7), (13, 10), (9, 16)]
SMALL = [(3, 3), (1, 6), (2, 11)]
PATCHES = [
    dict(),
    dict(kernel_size=3),
    dict(kernel_size=3, stride=2, padding='same'),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(2, 3), stride=(3, 2), padding='same', dilation=(1, 2)),
]


def lively(module):
    for name, param in module.named_parameters():
        if 'bias' in name or 'norm' in name:
            param.data.normal_()
    module.eval()  # of which MMPretrain's Swin returns None
    return module


def attentions():
    for shift in (0, 1, 2):
        for pad in (False, True):
            options = dict(shift_size=shift, pad_small_map=pad)
            yield ShiftWindowMSA(8, 2, 4, **options), pad
        yield MMDetShiftWindowMSA(8, 2, 4, shift), True


@pytest.mark.parametrize('source, pad', list(attentions()))
def test_attention(source, pad):
    export = ExportShiftWindows(lively(source))
    for height, width in SIZES + SMALL * pad:
        x = torch.randn(2, height * width, 8)
        wanted = source(x, (height, width))
        torch.testing.assert_close(export(x, (height, width)), wanted)


def test_small_maps_are_refused_as_by_the_host():
    source = ShiftWindowMSA(8, 2, 4, shift_size=2).eval()
    export = ExportShiftWindows(source)
    x = torch.randn(1, 15, 8)
    with pytest.raises(AssertionError, match='smaller than the window'):
        source(x, (3, 5))
    with pytest.raises(ValueError, match='side of 3 .* window of 4'):
        export(x, (3, 5))


@pytest.mark.parametrize('kind', [MMCVPatchMerging, MMDetPatchMerging])
@pytest.mark.parametrize('options', PATCHES)
def test_merging(kind, options):
    source = lively(kind(3, 6, bias=True, **options))
    export = ExportPatchMerging(source)
    for size in SIZES:
        x = torch.randn(2, size[0] * size[1], 3)
        wanted, shape = source(x, size)
        found, grid = export(x, size)
        assert grid == tuple(shape)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize('norm', [dict(type='LN'), None])
@pytest.mark.parametrize('post', [False, True])
def test_merging_with_the_norm_behind(norm, post):
    source = lively(PatchMerging(3, 6, use_post_norm=post, norm_cfg=norm))
    x = torch.randn(2, 35, 3)
    wanted, _ = source(x, (5, 7))
    torch.testing.assert_close(
        ExportPatchMerging(source)(x, (5, 7))[0], wanted
    )


@pytest.mark.parametrize('kind', [AdaptivePadding, MMDetAdaptivePadding])
@pytest.mark.parametrize('mode', ['same', 'corner'])
@pytest.mark.parametrize('kernel, stride', [(4, 4), (5, 2), (1, 3)])
def test_padding(kind, mode, kernel, stride):
    source = kind((kernel, 2), stride, padding=mode)
    for size in SIZES:
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(ExportPadding(source)(x), source(x))
    torch.testing.assert_close(ExportPadding(source)(x[0]), source(x[0]))


def swin(**options):
    arch = dict(embed_dims=4, depths=[1, 2], num_heads=[1, 2])
    model = SwinTransformer(arch, window_size=4, out_indices=(1,), **options)
    return lively(model)


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear'])
def test_positions(mode):
    model = swin(use_abs_pos_embed=True, img_size=40, interpolate_mode=mode)
    model.absolute_pos_embed.data.normal_()
    images = [torch.randn(1, 3, *size) for size in ((40, 40), (33, 50))]
    wanted = [model(image)[0] for image in images]
    replace_windows(model)
    for image, out in zip(images, wanted):
        torch.testing.assert_close(model(image)[0], out)


def test_what_is_replaced():
    model = swin()
    replace_windows(model)
    names = [type(module).__name__ for module in model.modules()]
    assert 'ShiftWindowMSA' not in names and 'PatchMerging' not in names
    assert names.count('ExportShiftWindows') == 3
    assert names.count('ExportPatchMerging') == 1
    assert names.count('ExportPadding') == 1

    class Renamed(ShiftWindowMSA):
        pass

    class Changed(ShiftWindowMSA):
        def forward(self, query, hw_shape):
            return query

    layers = nn.ModuleList([Renamed(8, 2, 4), Changed(8, 2, 4)])
    replace_windows(layers)
    assert isinstance(layers[0], ExportShiftWindows)
    assert isinstance(layers[1], Changed)
    # Not of a Swin.
    other = nn.Module()
    other.patch_embed = MMCVPatchEmbed()
    replace_windows(other)
    assert not isinstance(other.patch_embed, ExportPatchEmbed)
    assert isinstance(other.patch_embed.adaptive_padding, ExportPadding)


@pytest.mark.parametrize(
    'options, smallest',
    [
        (dict(), (25, 25)),
        (dict(pad_small_map=True), (1, 1)),
        (dict(patch_size=2), (13, 13)),
        (
            dict(
                patch_cfg=dict(kernel_size=7, padding=(2, 3)),
                stage_cfgs=dict(
                    downsample_cfg=dict(kernel_size=3, stride=2, padding=0)
                ),
            ),
            (35, 33),
        ),
    ],
)
def test_the_smallest_images(options, smallest):
    model = swin(**options)
    height, width = smallest
    wanted = model(torch.ones(1, 3, height, width))[0]
    if height > 1:
        for size in ((height - 1, width), (height, width - 1)):
            with pytest.raises(AssertionError):
                model(torch.ones(1, 3, *size))
    assert smallest_shape(nn.Linear(2, 2)) is None
    replace_windows(model)
    assert smallest_shape(model) == smallest
    found = model(torch.ones(1, 3, height, width))[0]
    torch.testing.assert_close(found, wanted)


def test_blocks_of_a_stage_share_where_tokens_go():
    layers = [
        ExportShiftWindows(ShiftWindowMSA(8, 2, 4, shift_size=shift).eval())
        for shift in (0, 2, 0, 2)
    ]
    grid = Grid((5, 9))
    assert Grid(grid) is grid and grid == (5, 9)
    for layer in layers:
        layer(torch.randn(1, 45, 8), grid)
    assert len(grid.known) == 2
