"""3D sampling against loops over points, levels and corners."""

import math
import re
import sys

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.ops import sampling_3d, share_levels
from lors_plugin.ops.sampling_3d.reference import level_weights


def make_inputs(
    batch=2, queries=3, groups=2, points=4, width=3, dtype=torch.float64
):
    strides = (4, 8, 16)
    feats = [
        torch.randn(batch, groups * width, 32 // s, 48 // s, dtype=dtype)
        for s in strides
    ]
    where = torch.rand(batch, queries, groups, points, 3, dtype=dtype)
    where[..., 0] = where[..., 0] * 60 - 6
    where[..., 1] = where[..., 1] * 44 - 6
    where[..., 2] = where[..., 2] * 5 + 1
    return feats, where, strides


def bilinear(feat, x, y):
    """Value of a (C, H, W) map at a position in cells; zero outside."""
    total = 0.0
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    for col in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= col < feat.shape[2] and 0 <= row < feat.shape[1]:
                share = (1 - abs(x - 0.5 - col)) * (1 - abs(y - 0.5 - row))
                total = total + share * feat[:, row, col]
    return total + feat.new_zeros(feat.shape[0])


def formula(feats, points, strides):
    """Section 3.1 of AdaMixer, a point and a level a time."""
    batch, queries, groups, number, _ = points.shape
    width = feats[0].shape[1] // groups
    out = points.new_zeros(batch, queries, groups, number, width)
    for b, n, g, p in torch.cartesian_prod(
        *(torch.arange(size) for size in (batch, queries, groups, number))
    ).tolist():
        x, y, z = points[b, n, g, p].tolist()
        weights = [math.exp(-((z - math.log2(s)) ** 2) / 2) for s in strides]
        for feat, stride, weight in zip(feats, strides, weights):
            own = feat[b, g * width : (g + 1) * width]
            value = bilinear(own, x / stride, y / stride)
            out[b, n, g, p] += weight / sum(weights) * value
    return out


def test_equals_the_loops():
    feats, points, strides = make_inputs()
    out = sampling_3d(feats, points, strides)
    assert out.dtype == torch.float64
    assert_close(out, formula(feats, points, strides))


def test_float32_equals_float64():
    feats, points, strides = make_inputs()
    out = sampling_3d([f.float() for f in feats], points.float(), strides)
    assert out.dtype == torch.float32
    wanted = formula(feats, points, strides).float()
    assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    feats, points, strides = make_inputs(queries=2, points=2, width=2)
    inputs = [t.requires_grad_() for t in (points, *feats)]
    assert torch.autograd.gradcheck(
        lambda where, *levels: sampling_3d(levels, where, strides), inputs
    )


def test_level_weights_sum_to_one_and_prefer_their_scale():
    z = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    weights = level_weights(z, (4, 8, 16, 32))
    assert weights.shape == (4, 2, 2)
    assert_close(weights.sum(0), torch.ones(2, 2))
    assert weights.argmax(0).flatten().tolist() == [0, 1, 2, 3]
    ratio = weights[0, 0, 0] / weights[1, 0, 0]
    assert_close(ratio.item(), math.exp(0.5), rtol=1e-5, atol=0)


def test_extreme_scales_stay_finite():
    z = torch.tensor([-50.0, 80.0])
    weights = level_weights(z, (4, 8, 16, 32))
    assert_close(weights.sum(0), torch.ones(2))
    assert weights.argmax(0).tolist() == [0, 3]


def test_constant_map_gives_its_constant_inside_and_zero_outside():
    feats = [torch.full((1, 2, 8, 8), 3.0), torch.full((1, 2, 4, 4), 3.0)]
    points = torch.tensor(
        [[16.0, 16.0, 2.0], [15.0, 9.0, 9.0], [-40.0, 9.0, 2.0], [5, 99, 2]]
    ).view(1, 1, 1, 4, 3)
    out = sampling_3d(feats, points, (4, 8))[0, 0, 0]
    assert_close(out[:2], torch.full((2, 2), 3.0))
    assert_close(out[2:], torch.zeros(2, 2), rtol=0, atol=0)


def test_cell_centres_give_the_cells():
    """Pixel (stride (i + 1/2)) is the centre of cell i: half-pixel rule."""
    feat = torch.arange(12.0).view(1, 1, 3, 4)
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing='ij')
    xy = (torch.stack([x, y], -1) + 0.5) * 8
    points = torch.cat([xy, torch.zeros(3, 4, 1)], -1).view(1, 1, 1, 12, 3)
    out = sampling_3d([feat], points, (8,))
    assert_close(out.flatten(), feat.flatten())


def test_one_level_ignores_scale():
    feats, points, _ = make_inputs()
    out = sampling_3d(feats[:1], points, (4,))
    points[..., 2] += 3.0
    assert_close(sampling_3d(feats[:1], points, (4,)), out)


def test_groups_read_their_own_channels_at_their_own_points():
    feats, points, strides = make_inputs(groups=3, width=2)
    out = sampling_3d(feats, points, strides)
    for g in range(3):
        own = [f[:, 2 * g : 2 * g + 2] for f in feats]
        alone = sampling_3d(own, points[:, :, g : g + 1], strides)
        assert_close(out[:, :, g : g + 1], alone)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_float32(dtype):
    feats, points, strides = make_inputs(dtype=torch.float32)
    wanted = sampling_3d(feats, points, strides)
    with torch.autocast('cpu', dtype):
        out = sampling_3d(feats, points, strides)
    assert out.dtype == torch.float32
    assert_close(out, wanted, rtol=0, atol=0)
    low = sampling_3d([f.to(dtype) for f in feats], points, strides)
    assert low.dtype == torch.float32


@pytest.mark.parametrize(('batch', 'queries'), [(2, 0), (0, 3)])
def test_nothing_to_sample(batch, queries):
    feats, points, strides = make_inputs(batch, queries)
    out = sampling_3d(feats, points.requires_grad_(), strides)
    assert out.shape == (batch, queries, 2, 4, 3)
    out.sum().backward()


def test_non_contiguous():
    feats, points, strides = make_inputs()
    odd = [f.transpose(2, 3).contiguous().transpose(2, 3) for f in feats]
    where = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert not where.is_contiguous()
    assert_close(
        sampling_3d(odd, where, strides), sampling_3d(feats, points, strides)
    )


BAD = {
    'levels': (3, (2, 3, 2, 4, 3), (4, 8), '3 feature levels do not fit 2'),
    'no_level': (0, (2, 3, 2, 4, 3), (), '0 feature levels do not fit 0'),
    'points_dims': (
        3,
        (2, 3, 8, 3),
        (4, 8, 16),
        'points must have shape (B, N, G, P, 3), got (2, 3, 8, 3)',
    ),
    'points_last': (
        3,
        (2, 3, 2, 4, 2),
        (4, 8, 16),
        'points must have shape (B, N, G, P, 3)',
    ),
    'batch': (
        3,
        (1, 3, 2, 4, 3),
        (4, 8, 16),
        'points of 1 images do not fit levels of 2 images',
    ),
    'groups': (
        3,
        (2, 3, 4, 4, 3),
        (4, 8, 16),
        'levels of 6 channels do not fit points of 4 groups',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_shapes_that_do_not_fit(name):
    levels, shape, strides, message = BAD[name]
    feats = make_inputs()[0][:levels]
    with pytest.raises(ValueError, match=re.escape(message)):
        sampling_3d(feats, torch.zeros(shape), strides)


def test_levels_of_other_widths():
    feats, points, strides = make_inputs()
    feats[2] = feats[2][:, :4]
    with pytest.raises(
        ValueError, match=re.escape('feats[2] has 2 images of 4')
    ):
        sampling_3d(feats, points, strides)
    feats[2] = feats[2][0]
    with pytest.raises(
        ValueError, match=re.escape('feats[2] must have shape')
    ):
        share_levels(feats, strides, [(3, 2, 4)])


def test_one_pass_without_gradients_packs_nothing(monkeypatch):
    """On a CPU packing costs more than one forward pass can save."""
    # The function has the name of its module.
    module = sys.modules[sampling_3d.__module__]
    packed, plain = [], module._pack
    monkeypatch.setattr(
        module, '_pack', lambda *a: packed.append(a) or plain(*a)
    )
    feats = [torch.randn(1, 4, 5, 6)]
    points = torch.rand(1, 2, 2, 3, 3) * 10
    still = sampling_3d(feats, points, [4])
    assert not packed
    moving = sampling_3d(feats, points.requires_grad_(), [4])
    assert packed
    torch.testing.assert_close(still, moving)
