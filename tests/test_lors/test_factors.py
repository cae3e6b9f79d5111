import pytest
import torch

from lors_plugin.lors import factorize


def test_full_rank_loses_nothing():
    weights = torch.randn(3, 5, 7)
    factors = factorize(list(weights), [5, 5, 5])
    for weight, down, up in zip(weights, factors.down, factors.up):
        torch.testing.assert_close(factors.shared + up @ down, weight)
    assert factors.error < 1e-6
    assert factors.shared.dtype == torch.float32


def test_private_parts_are_the_best_of_their_rank():
    """What is lost are the smaller singular values of the residuals."""
    weights = torch.randn(3, 5, 7)
    ranks = [0, 2, 4]
    factors = factorize(list(weights), ranks)
    assert [len(down) for down in factors.down] == ranks
    torch.testing.assert_close(factors.shared, weights.mean(0))
    lost = 0
    for weight, rank in zip(weights, ranks):
        values = torch.linalg.svdvals(weight - weights.mean(0))
        lost += values[rank:].square().sum()
    wanted = (lost / weights.square().sum()).sqrt().item()
    assert factors.error == pytest.approx(wanted, rel=1e-5)


def test_equal_layers_need_no_private_part():
    weight = torch.randn(4, 4)
    factors = factorize([weight, weight], [1, 0])
    torch.testing.assert_close(factors.shared, weight)
    assert factors.error < 1e-6
    assert factorize([weight * 0] * 2, [1, 1]).error == 0
