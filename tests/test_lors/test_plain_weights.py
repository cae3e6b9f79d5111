"""Checkpoints of plain models start a model whose stacks share."""

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from lors_plugin.lors import factorize, share_stack
from lors_plugin.testing import randomize


def make(seed=0, rank=None):
    model = nn.ModuleDict(
        dict(
            body=nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]),
            head=nn.Linear(6, 2),
        )
    )
    randomize(model, seed)
    if rank is not None:
        share_stack(model, [r'body\.(\d)'], ranks=rank)
    return model


def strictly(model, state):
    model.load_state_dict(state, strict=True)


def by_mmengine(model, state):
    load_state_dict(model, state, strict=True)


@pytest.mark.parametrize('load', [strictly, by_mmengine])
def test_plain_weights_are_approximated(load):
    plain = make(1)
    state = plain.state_dict()
    before = dict(state)
    model = make(2, rank=[1, 0, 4])
    load(model, state)
    assert dict(state).keys() == before.keys()
    kept = copy.deepcopy(plain)
    share_stack(kept, [r'body\.(\d)'], ranks=[1, 0, 4], init='svd')
    for key, value in kept.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_a_wrapper_does_not_disturb():
    plain = nn.ModuleDict(dict(module=make(1)))
    model = nn.ModuleDict(dict(module=make(2, rank=6)))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6)
    torch.testing.assert_close(
        model['module']['body'](x), plain['module']['body'](x)
    )


def test_copies_load_into_themselves():
    model = make(2, rank=6)
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    plain = make(1)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6)
    torch.testing.assert_close(other['body'](x), plain['body'](x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_own_weights_are_read_as_they_are():
    model, other = make(1, rank=2), make(2, rank=2)
    other.load_state_dict(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize('change', ['missing', 'shape'])
def test_other_weights_are_left_to_the_usual_messages(change):
    state = make(1).state_dict()
    if change == 'missing':
        del state['body.1.weight']
    else:
        state['body.1.weight'] = torch.zeros(6, 5)
    with pytest.raises(RuntimeError, match='body.0.shared_weight'):
        make(2, rank=2).load_state_dict(state)


def test_a_layer_at_two_places():
    def twice(model):
        model['again'] = nn.ModuleList([model['body'][0], model['body'][1]])
        return model

    plain = twice(make(1))
    model = twice(make(2))
    share_stack(model, [r'body\.(\d)'], ranks=6)
    model.load_state_dict(plain.state_dict())
    assert model['again'][1] is model['body'][1]
    x = torch.randn(2, 6)
    torch.testing.assert_close(model['again'][1](x), plain['again'][1](x))


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
