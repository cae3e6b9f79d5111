"""Multiply-adds against counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lors_plugin.analysis import OperatorCounter
from lors_plugin.analysis.flops import (
    low_rank_products,
    mixing_multiply_adds,
    sampling_multiply_adds,
)
from lors_plugin.ops import adaptive_mixing, sampling_3d

# A stage of LORS-AdaMixer: an image, 100 queries.
B, N, G, P, Q, C, RANK = 1, 100, 2, 64, 128, 128, 16


def giga(number):
    return f'{number / 1e9:.2f}'


def test_pytorch_counts_our_operators():
    """Its counter takes two FLOPs per multiply-add."""
    x, weights = torch.rand(2, 3, 2, 4, 8), torch.rand(2, 3, 2, 8 * 8 + 5 * 4)
    feats = [torch.rand(2, 16, 6, 6), torch.rand(2, 16, 3, 3)]
    points = torch.rand(2, 3, 2, 4, 3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adaptive_mixing(x, weights, backend='torch')
        sampling_3d(feats, points, (4, 8), backend='torch')
    mixing = mixing_multiply_adds(x.shape, weights.shape)['']
    sampling = sampling_multiply_adds((2, 3, 2, 4, 8), 2)
    assert counter.get_total_flops() == 2 * (mixing + sampling)


def test_products_of_mixing():
    counts = mixing_multiply_adds((B, N, G, P, C), (B, N, G, C * C + Q * P))
    channel = N * G * P * C * C
    spatial = N * G * Q * P * C
    assert giga(channel) == giga(spatial) == '0.21'
    assert counts == {'': channel + spatial, 'low_rank': 0}


def test_low_rank_parts_of_mixing():
    """0.14 G a parameter group if factored, 0.09 G the cheaper way."""
    channel = low_rank_products(C, C, P, 1, RANK)
    spatial = low_rank_products(Q, P, C, 1, RANK)
    assert channel[0] == P * C * RANK + P * RANK**2 + P * RANK * C
    assert spatial[1] == RANK * RANK * P + Q * RANK * P
    assert giga(N * G * (channel[0] + spatial[0])) == '0.14'
    assert [giga(N * G * n) for n in channel] == ['0.06', '0.06']
    assert [giga(N * G * n) for n in spatial] == ['0.09', '0.03']
    core = (B, N, G, 3, RANK, RANK)
    counts = mixing_multiply_adds(
        (B, N, G, P, C), (B, N, G, C * C + Q * P), core, core
    )
    assert counts['low_rank'] == 3 * N * G * (channel[0] + spatial[1])
    assert giga(counts['low_rank'] / 3) == '0.09'


def test_sampling():
    """Four cells and a level weight, for each point, level and channel."""
    assert sampling_multiply_adds((2, 7, 4, 32, 64), 3) == (
        2 * 7 * 4 * 32 * 64 * 3 * (4 + 1)
    )


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def count(module, *shapes):
    module = module if isinstance(module, nn.Module) else Call(module)
    inputs = [torch.rand(shape) for shape in shapes]
    with torch.no_grad(), OperatorCounter(module) as counter:
        module(*inputs)
    assert not counter.uncounted
    return sum(counter.multiply_adds.values())


def grid_sample(mode):
    return lambda x, grid: F.grid_sample(x, grid, mode, align_corners=False)


def embedding_bag(weights, table):
    index = torch.tensor([[0, 1, 2], [2, 3, 3]])
    return F.embedding_bag(
        index, table, mode='sum', per_sample_weights=weights
    )


def resize(mode):
    return lambda x: F.interpolate(x, size=(6, 10), mode=mode)


CASES = {
    'linear': (nn.Linear(5, 7), [(2, 3, 5)], 2 * 3 * 5 * 7),
    'linear_of_one_row': (nn.Linear(5, 7), [(5,)], 5 * 7),
    'matrix_vector': (torch.mv, [(4, 6), (6,)], 24),
    'dot': (torch.dot, [(9,), (9,)], 9),
    'batched': (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)], 6 * 4 * 5 * 6),
    'einsum': (
        lambda x, y: torch.einsum('bnc,bmc->bnm', x, y),
        [(2, 3, 5), (2, 4, 5)],
        2 * 3 * 4 * 5,
    ),
    'conv': (
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        [(2, 3, 9, 11)],
        2 * (5 * 6) * 8 * 3 * 9,
    ),
    'depth_wise': (
        nn.Conv2d(6, 6, 5, groups=6, padding=2),
        [(1, 6, 8, 8)],
        64 * 6 * 25,
    ),
    'transposed': (
        nn.ConvTranspose2d(4, 5, 2, stride=2),
        [(1, 4, 3, 3)],
        9 * 4 * 5 * 4,
    ),
    'bilinear': (
        grid_sample('bilinear'), [(2, 3, 8, 8), (2, 5, 6, 2)], 180 * 4
    ),
    'nearest': (grid_sample('nearest'), [(2, 3, 8, 8), (2, 5, 6, 2)], 0),
    'bicubic': (
        grid_sample('bicubic'), [(2, 3, 8, 8), (2, 5, 6, 2)], 180 * 16
    ),
    'volume': (
        grid_sample('bilinear'),
        [(1, 2, 4, 4, 4), (1, 3, 3, 3, 3)],
        2 * 27 * 8,
    ),
    'embedding_bag': (embedding_bag, [(2, 3), (4, 10)], 2 * 3 * 10),
    'resize': (resize('bilinear'), [(1, 2, 3, 5)], 2 * 60 * 4),
    'copied_pixels': (resize('nearest'), [(1, 2, 3, 5)], 0),
    'attention': (
        F.scaled_dot_product_attention,
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)],
        6 * (5 * 7 * 4 + 5 * 7 * 6),
    ),
    'multi_head': (
        lambda x: nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x)[0],
        [(2, 5, 8)],
        2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8),
    ),
    'norm_and_relu': (
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), [(2, 3, 4, 4)], 0
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ('module', 'shapes', 'wanted'), CASES.values(), ids=CASES
)
def test_operators(module, shapes, wanted):
    assert count(module, *shapes) == wanted


def test_deformable_convolution():
    """Two channels less than usual: 3 -> 4, 3 x 3 kernel, 5 x 7 places."""
    from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack

    places, cells = 5 * 7, 9
    for kind, offsets, each in (
        (ModulatedDeformConv2dPack, 3 * cells, 5),
        (DeformConv2dPack, 2 * cells, 4),
    ):
        module = kind(3, 4, 3, padding=1)
        wanted = places * cells * 3 * (offsets + 4 + each)
        assert count(module, (1, 3, 5, 7)) == wanted
        assert 'forward' not in vars(module)


@pytest.mark.parametrize('bias', [False, True])
def test_dynamic_layers(bias):
    """One kernel an image, mixed of three; the router beside it."""
    from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
    from lors_plugin.parameternet.dynamic_linear import DynamicLinear

    conv = DynamicConv2d(8, 12, 3, 2, 1, groups=4, bias=bias, num_experts=3)
    linear = DynamicLinear(12, 5, bias=bias, num_experts=2)
    model = nn.ModuleDict(dict(conv=conv, linear=linear))
    with torch.no_grad(), OperatorCounter(model) as counter:
        x = conv(torch.zeros(2, 8, 7, 10))
        linear(x.flatten(2).mT)
    pixels = 2 * 4 * 5
    # With or without an operator of ours, by the names of what is counted.
    found = {'conv': 0, 'conv.routing': 0, 'linear': 0, 'linear.routing': 0}
    for name, number in counter.multiply_adds.items():
        layer, routing, _ = f'{name}..'.split('.', 2)
        found[layer + '.routing' * (routing == 'routing')] += number
    assert found == {
        'conv': pixels * 12 * 2 * 9 + 2 * 3 * (12 * 2 * 9 + 12 * bias),
        'conv.routing': 2 * (8 * 8 + 8 * 3),
        'linear': pixels * 12 * 5 + 2 * 2 * (12 * 5 + 5 * bias),
        'linear.routing': 2 * (12 * 12 + 12 * 2),
    }
    assert not counter.uncounted
