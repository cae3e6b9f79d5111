"""Adaptive LORS, and what both stacks refuse."""

import math

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.lors import AdaptiveLowRankStack, LowRankLinearStack
from lors_plugin.testing import randomize


def test_adaptive_stack_is_the_sum_of_products():
    stack = AdaptiveLowRankStack(5, 6, 2, [2, 3], [1, 2], copies=2)
    randomize(stack.double())
    assert stack.core_sizes == [2 * 1 * 4, 2 * 2 * 9]
    for layer, (num, rank) in enumerate(((1, 2), (2, 3))):
        core = torch.randn(3, 4, stack.core_sizes[layer], dtype=torch.float64)
        product = stack(core, layer).product()
        cores = core.view(3, 4, 2, num, rank, rank)
        wanted = torch.zeros(3, 4, 2, 5, 6, dtype=torch.float64)
        for k in range(num):
            for g in range(2):
                left = stack.left[layer][g, k]
                right = stack.right[layer][g, k]
                wanted[:, :, g] += left @ cores[:, :, g, k] @ right
        assert_close(product, wanted)


def test_adaptive_stack_of_rank_zero_has_no_part():
    stack = AdaptiveLowRankStack(5, 6, 2, [0, 3], 1)
    assert stack(torch.zeros(1, 2, 0), 0) is None
    assert stack(torch.zeros(1, 2, 9), 1) is not None
    assert not stack.left[0].requires_grad
    assert not stack.right[0].requires_grad


@pytest.mark.parametrize(
    ('fan_in', 'left', 'right'),
    [('stacked', 50 * 4, 4 * 70), ('matrix', 4, 70)],
)
def test_adaptive_stack_init(fan_in, left, right):
    stack = AdaptiveLowRankStack(50, 70, 2, 4, 3, 2, fan_in)
    for params, fan in ((stack.left, left), (stack.right, right)):
        bound = math.sqrt(6 / fan)
        for param in params:
            assert 0.95 * bound < param.abs().max() <= bound
            assert_close(
                param.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0
            )


def test_stacked_fan_in_is_torchs_for_three_dimensions():
    """What the original gets from Kaiming on (G K, rows, cols)."""
    fan_in, _ = torch.nn.init._calculate_fan_in_and_fan_out(
        torch.empty(6, 50, 4)
    )
    assert fan_in == 50 * 4


ERRORS = [
    (dict(ranks=[1, 2]), 'ranks=.1, 2. has 2 values for 3 layers'),
    (dict(ranks=-1), 'ranks=-1 must hold whole numbers of at least 0'),
    (dict(ranks=[1, 2, 1.5]), 'ranks=.* must hold whole numbers'),
    (dict(ranks=1.5), 'ranks=1.5 must hold whole numbers'),
    (dict(ranks=None), 'ranks=None must hold whole numbers'),
    (dict(ranks=1, groups=0), 'groups=0 must hold whole numbers of at least'),
    (dict(ranks=1, groups=[1] * 4), 'groups=.* has 4 values for 3 layers'),
]


@pytest.mark.parametrize(('options', 'message'), ERRORS)
def test_bad_lists(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankLinearStack(6, 5, 3, **options)
    with pytest.raises(ValueError, match=message):
        AdaptiveLowRankStack(6, 5, 3, **dict(dict(groups=1), **options))


def test_bad_fan_in():
    with pytest.raises(ValueError, match="fan_in='rows' must be one of"):
        AdaptiveLowRankStack(6, 5, 3, 1, 1, fan_in='rows')


def test_repr_tells_the_ranks():
    assert 'ranks=[2, 0, 6]' in repr(
        LowRankLinearStack(6, 5, 3, [2, 0, 3], [1, 1, 2])
    )
    assert 'groups=[1, 2]' in repr(AdaptiveLowRankStack(5, 6, 2, 2, [1, 2]))
