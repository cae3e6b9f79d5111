"""Normalisations with statistics in float32."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.adamixer.norm import GroupNorm, LayerNorm
from lors_plugin.testing import randomize

CASES = {
    'layer': (LayerNorm(12), nn.LayerNorm(12), (2, 5, 12)),
    'group': (GroupNorm(3, 12), nn.GroupNorm(3, 12), (2, 12, 4, 5)),
}


@pytest.mark.parametrize('name', CASES)
def test_is_torchs_in_float32(name):
    mine, theirs, shape = CASES[name]
    theirs.load_state_dict(randomize(mine).state_dict())
    x = torch.randn(shape)
    assert_close(mine(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', CASES)
def test_low_precision_gives_float32(name, dtype):
    """Far from zero: what is lost is the rounding of the input alone."""
    mine, theirs, shape = CASES[name]
    theirs.load_state_dict(randomize(mine).state_dict())
    x = (torch.randn(shape) * 8 + 50).to(dtype)
    with torch.autocast('cpu', dtype):
        out = mine(x)
    assert out.dtype == torch.float32
    assert_close(out, theirs(x.float()))


@pytest.mark.parametrize('name', CASES)
def test_float64_stays(name):
    mine, _, shape = CASES[name]
    x = torch.randn(shape, dtype=torch.float64)
    assert type(mine).forward(mine.double(), x).dtype == torch.float64
    mine.float()
