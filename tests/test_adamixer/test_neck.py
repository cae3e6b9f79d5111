"""The neck: convolutions, one norm for all levels."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.adamixer.neck import SharedNormChannelMapping
from lors_plugin.testing import randomize

CHANNELS = [4, 6, 10]


def levels(channels=CHANNELS, batch=2):
    return [
        torch.randn(batch, c, 8 >> i, 12 >> i) for i, c in enumerate(channels)
    ]


def test_equals_the_formula():
    neck = randomize(SharedNormChannelMapping(CHANNELS, 16, 4))
    feats = levels()
    for out, conv, feat in zip(neck(feats), neck.convs, feats):
        x = torch.einsum('oi,bihw->bohw', conv.weight[:, :, 0, 0], feat)
        x = (x + conv.bias[:, None, None]).unflatten(1, (4, 4))
        mean = x.mean((2, 3, 4), keepdim=True)
        var = x.var((2, 3, 4), unbiased=False, keepdim=True)
        x = ((x - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        scale, shift = neck.norm.weight, neck.norm.bias
        assert_close(
            out,
            x * scale[:, None, None] + shift[:, None, None],
            rtol=1e-4,
            atol=1e-5,
        )


def test_one_norm_for_all_levels():
    neck = SharedNormChannelMapping(CHANNELS, 16, 4)
    norms = [key for key in neck.state_dict() if key.startswith('norm')]
    assert norms == ['norm.weight', 'norm.bias']
    assert len(neck.convs) == 3


def test_default_sizes():
    neck = SharedNormChannelMapping([8])
    assert neck.out_channels == 256
    assert neck.norm.num_groups == 32


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_norm_is_float32(dtype):
    neck = randomize(SharedNormChannelMapping(CHANNELS, 16, 4))
    feats = levels()
    with torch.autocast('cpu', dtype):
        outs = neck(feats)
    for out, conv, feat in zip(outs, neck.convs, feats):
        assert out.dtype == torch.float32
        with torch.autocast('cpu', dtype):
            x = conv(feat).float()
        wanted = F.group_norm(x, 4, neck.norm.weight, neck.norm.bias)
        assert_close(out, wanted)


def test_other_levels_than_configured():
    neck = SharedNormChannelMapping(CHANNELS, 16, 4)
    message = (
        'the backbone gives levels of [4, 6] channels but '
        'neck.in_channels=[4, 6, 10]'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        neck(levels([4, 6]))
    with pytest.raises(ValueError, match='neck.in_channels='):
        neck(levels([4, 6, 12]))


def test_norm_groups_that_do_not_divide():
    message = 'out_channels=48 must be divisible by num_norm_groups=32'
    with pytest.raises(ValueError, match=message):
        SharedNormChannelMapping(CHANNELS, 48)
