"""Gathers read what GridSample reads."""

import pytest
import torch
import torch.nn.functional as F

from lors_plugin.adamixer.sampling import AdaptiveSampling3D
from lors_plugin.export.check import ExportError
from lors_plugin.export.sampling import (
    GatherSampling3D,
    grid_sample_by_gather,
    sampled_by,
)

OPTIONS = dict(padding_mode='zeros', align_corners=False)


@pytest.mark.parametrize('shape', [(5, 7), (1, 9), (8, 8)])
def test_bilinear_with_zeros_outside(shape):
    maps = torch.randn(3, 2, *shape)
    grid = torch.rand(3, 4, 6, 2) * 2.6 - 1.3
    grid[0, 0, 0] = -1.0  # corners, and far outside
    grid[0, 0, 1] = 1.0
    grid[0, 0, 2] = 1e4
    wanted = F.grid_sample(maps, grid, **OPTIONS)
    found = grid_sample_by_gather(maps, grid, **OPTIONS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_all_levels_of_a_pyramid():
    source = AdaptiveSampling3D(8, num_groups=2, num_points=5)
    torch.nn.init.normal_(source.offsets.weight)
    strides, content = (4, 8), torch.randn(3, 6, 8)
    feats = [torch.randn(3, 4, 32 // s, 48 // s) for s in strides]
    xyzr = torch.tensor([24.0, 16, 4, 0]) + torch.randn(3, 6, 4)
    wanted = source(feats, content, xyzr, strides)
    found = GatherSampling3D(source)(feats, content, xyzr, strides)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    # Some points lie outside.
    assert (wanted == 0).any() and (wanted != 0).any()


@pytest.mark.parametrize(
    'options',
    [
        dict(mode='nearest'),
        dict(padding_mode='border'),
        dict(align_corners=True),
    ],
)
def test_others_are_refused(options):
    maps, grid = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 2)
    with pytest.raises(ExportError, match='--sampling grid_sample'):
        grid_sample_by_gather(maps, grid, **{**OPTIONS, **options})


def test_the_function_is_restored():
    original = F.grid_sample
    with pytest.raises(ZeroDivisionError), sampled_by('gather'):
        assert F.grid_sample is grid_sample_by_gather
        raise ZeroDivisionError
    assert F.grid_sample is original
    with sampled_by('grid_sample'):
        assert F.grid_sample is original
    with pytest.raises(ValueError, match="sampling='x' must be one of"):
        sampled_by('x').__enter__()
