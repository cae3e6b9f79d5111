"""Parts of side_by_side_training against autograd of plain operators."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.ops.dynamic_conv.side_by_side_training import depthwise


@pytest.mark.parametrize('attended', [False, True])
@pytest.mark.parametrize('size', [(9, 12), (4, 3), (1, 5)], ids=str)
@pytest.mark.parametrize(
    ('kernel', 'stride', 'padding', 'dilation'),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((5, 5), (2, 2), (2, 2), (1, 1)),
        ((5, 5), (2, 1), (2, 2), (1, 1)),
        ((7, 5), (3, 2), (3, 3), (1, 1)),
        ((5, 5), (2, 2), (4, 4), (2, 2)),
        ((5, 1), (6, 2), (2, 0), (1, 1)),
    ],
    ids=str,
)
def test_depthwise(kernel, stride, padding, dilation, size, attended):
    batch, channels = 3, 4
    maps = torch.randn(size[0] * size[1], batch, channels).double()
    weight = torch.randn(2 if attended else 1, channels, 1, *kernel).double()
    attention = torch.rand(batch, 2).double() if attended else None
    given = [t for t in (maps, weight, attention) if t is not None]
    for tensor in given:
        tensor.requires_grad_()
    geometry = stride, padding, dilation
    out, found = depthwise(maps, size, weight, attention, *geometry)
    images = maps.unflatten(0, size).permute(2, 3, 0, 1)
    if attended:
        kernels = torch.einsum('bm,mcihw->bcihw', attention, weight)
    else:
        kernels = weight.expand(batch, -1, -1, -1, -1)
    wanted = torch.cat(
        [
            F.conv2d(image[None], kernel, None, *geometry, channels)
            for image, kernel in zip(images, kernels)
        ]
    )
    assert found == wanted.shape[2:]
    wanted = wanted.permute(2, 3, 0, 1).flatten(0, 1)
    assert_close(out, wanted)
    grad = torch.randn_like(out)
    assert_close(
        torch.autograd.grad(out, given, grad),
        torch.autograd.grad(wanted, given, grad),
    )
