"""Where queries look."""

import math

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.adamixer.sampling import AdaptiveSampling3D
from lors_plugin.ops import sampling_3d
from lors_plugin.testing import randomize


def biases(sampling):
    groups, points = sampling.num_groups, sampling.num_points
    return sampling.offsets.bias.detach().view(groups, points, 3)


def test_points_by_hand():
    """A box of 16 x 64 around (100, 50); an offset of half a box."""
    sampling = AdaptiveSampling3D(8, 1, 1)
    sampling.offsets.weight.data.zero_()
    sampling.offsets.bias.data = torch.tensor([0.5, -0.25, -1.0])
    xyzr = torch.tensor([[[100.0, 50.0, 5.0, 2.0]]])
    points = sampling.points(torch.randn(1, 1, 8), xyzr)
    assert_close(points.flatten(), torch.tensor([108.0, 34.0, 4.0]))


def test_points_against_a_loop():
    sampling = randomize(AdaptiveSampling3D(8, 2, 3).double())
    content = torch.randn(2, 4, 8, dtype=torch.float64)
    xyzr = torch.randn(2, 4, 4, dtype=torch.float64) + 4
    points = sampling.points(content, xyzr)
    assert points.shape == (2, 4, 2, 3, 3)
    weight, bias = sampling.offsets.weight, sampling.offsets.bias
    for b in range(2):
        for n in range(4):
            x, y, z, r = xyzr[b, n]
            offsets = (weight @ content[b, n] + bias).view(2, 3, 3)
            for g in range(2):
                for p in range(3):
                    dx, dy, dz = offsets[g, p]
                    wanted = torch.stack(
                        [
                            x + dx * 2 ** (z - r / 2),
                            y + dy * 2 ** (z + r / 2),
                            z + dz,
                        ]
                    )
                    assert_close(points[b, n, g, p], wanted)


def test_points_carry_gradients():
    sampling = randomize(AdaptiveSampling3D(8, 2, 3))
    content = torch.randn(1, 2, 8, requires_grad=True)
    xyzr = torch.tensor([[[20.0, 20.0, 4.0, 0.0]] * 2])
    feats = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    out = sampling(feats, content, xyzr, (4, 8))
    assert_close(
        out, sampling_3d(feats, sampling.points(content, xyzr), (4, 8))
    )
    out.backward(torch.randn_like(out))
    assert content.grad.abs().sum() > 0
    assert sampling.offsets.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('side', [1, 2, 4, 6, 8])
def test_square_numbers_start_on_a_grid_of_cell_centres(side):
    sampling = AdaptiveSampling3D(8, 2, side**2)
    sampling.init_weights()
    assert not sampling.offsets.weight.any()
    for group in biases(sampling):
        assert_close(group[:, 2], torch.full((side**2,), -1.0))
        wanted = {
            (
                round((i + 0.5) / side - 0.5, 5),
                round((j + 0.5) / side - 0.5, 5),
            )
            for i in range(side)
            for j in range(side)
        }
        have = {(round(x, 5), round(y, 5)) for x, y, _ in group.tolist()}
        assert have == wanted


@pytest.mark.parametrize('points', [2, 32, 200])
def test_other_numbers_start_uniform(points):
    sampling = AdaptiveSampling3D(8, 4, points)
    sampling.init_weights()
    assert not sampling.offsets.weight.any()
    bias = biases(sampling)
    assert_close(bias[..., 2], torch.full((4, points), -1.0))
    xy = bias[..., :2]
    assert xy.abs().max() <= 0.5
    assert xy.unique().numel() > 0.9 * xy.numel()
    if points == 200:
        assert abs(xy.mean()) < 0.03
        assert_close(xy.std().item(), 1 / math.sqrt(12), rtol=0.1, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_points_are_float32_under_autocast(dtype):
    sampling = randomize(AdaptiveSampling3D(8, 2, 3))
    xyzr = torch.tensor([[[1201.5, 20.25, 4.0, 0.0]]])
    sampling.offsets.weight.data.zero_()
    sampling.offsets.bias.data.zero_()
    with torch.autocast('cpu', dtype):
        points = sampling.points(torch.randn(1, 1, 8), xyzr)
    assert points.dtype == torch.float32
    assert_close(points[0, 0, 0, 0], xyzr[0, 0, :3])
