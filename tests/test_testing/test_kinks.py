"""Finding ReLUs on their kink, and putting them on the other side."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lors_plugin.testing import randomize, rule_weight
from lors_plugin.testing.kinks import Element, Kinks

X = [[-1.0, 1e-7, 2.0], [-1e-7, 0.0, 3e-6]]
WRITTEN_DOWN = [[0.684992, -0.1587131], [0.5520282, 0.2037913]]
FORMS = {
    'torch': torch.relu,
    'function': F.relu,
    'inplace': lambda x: F.relu(x, inplace=True),
    'method': lambda x: x.relu(),
    'module': nn.ReLU(),
    'module_inplace': nn.ReLU(inplace=True),
    'underscore': lambda x: x.relu_(),
}


@pytest.mark.parametrize('form', FORMS)
def test_finds_elements(form):
    with Kinks(1e-5, 9) as kinks:
        FORMS[form](torch.ones(2, requires_grad=True) * 1)
        out = FORMS[form](torch.tensor(X, requires_grad=True) * 1)
    assert_close(out, torch.tensor(X).clamp(min=0))
    found = kinks.nearest()
    assert [(e.call, e.index) for e in found] == [(1, 1), (1, 3), (1, 5)]
    assert found[0].value == pytest.approx(1e-7)


@pytest.mark.parametrize('form', FORMS)
def test_flips_gradients_of_chosen_elements_only(form):
    upstream = torch.randn(2, 3)
    grads = []
    for flipped in ((), (Element(1e-7, 1, 1), Element(1e-7, 1, 3))):
        x = torch.tensor(X, requires_grad=True)
        with Kinks(1e-5, 9, flipped):
            first = FORMS[form](x * 1)
            out = FORMS[form](x * 1)
        assert_close(out, first)
        (out * upstream + first).sum().backward()
        grads.append(x.grad)
    change = grads[1] - grads[0]
    wanted = torch.zeros(2, 3)
    wanted[0, 1], wanted[1, 0] = -upstream[0, 1], upstream[1, 0]
    assert_close(change, wanted)


def test_does_nothing_without_elements():
    x = torch.randn(50, requires_grad=True)
    upstream = torch.randn(50)
    (plain,) = torch.autograd.grad(x.relu(), x, upstream)
    with Kinks(1e-5, 9) as kinks:
        (watched,) = torch.autograd.grad(x.relu(), x, upstream)
    assert_close(watched, plain, rtol=0, atol=0)
    assert kinks.nearest() == []


def test_stops_watching():
    with Kinks(1e-5, 9) as kinks:
        pass
    torch.relu(torch.tensor(X, requires_grad=True))
    assert kinks.nearest() == []


def test_nothing_to_remember_without_gradients():
    with Kinks(1e-5, 9) as kinks:
        torch.relu(torch.tensor(X))
    assert kinks.nearest() == []


def test_nearest_first_up_to_a_limit():
    x = torch.tensor(X, requires_grad=True)
    with Kinks(1e-5, 2) as kinks:
        torch.relu(x * 2)
        torch.relu(x)
    assert [e.call for e in kinks.nearest()] == [1, 1]


def test_exact_zeros_are_no_kinks():
    """Padding and dead units are zero in every program."""
    with Kinks(1e-5, 9) as kinks:
        torch.relu(torch.zeros(10, requires_grad=True))
    assert kinks.nearest() == []


def test_rule_weight():
    first = rule_weight('a.weight', (4, 9), 3, 'other')
    assert first.dtype == 'float32'
    assert (first == rule_weight('a.weight', (4, 9), 3, 'other')).all()
    assert (first != rule_weight('b.weight', (4, 9), 3, 'other')).any()
    assert (first != rule_weight('a.weight', (4, 9), 4, 'other')).any()
    assert abs(rule_weight('x', (300, 100), 0, 'other').std() - 0.1) < 0.01
    norm = rule_weight('n.weight', (500,), 0, 'norm')
    assert abs(norm.mean() - 1) < 0.05
    assert abs(rule_weight('n.bias', (500,), 0, 'norm').mean()) < 0.05
    assert (rule_weight('running_var', (500,), 0, 'norm') >= 0.8).all()
    assert rule_weight('num_batches_tracked', (), 0, 'norm') == 0


def test_rule_weight_is_the_one_of_the_goldens():
    """Values written down once: another numpy must give the same."""
    weight = rule_weight('layer.weight', (2, 2), 7, 'other')
    assert_close(
        torch.from_numpy(weight),
        torch.tensor(WRITTEN_DOWN),
        rtol=1e-6,
        atol=0,
    )


def test_randomize_leaves_nothing_at_its_start():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert randomize(model) is model
    for key, value in model.state_dict().items():
        if not key.endswith('num_batches_tracked'):
            assert (value != before[key]).any(), key
    again = {k: v.clone() for k, v in model.state_dict().items()}
    assert_close(dict(randomize(model).state_dict()), again)
    other = randomize(model, 1).state_dict()
    assert (other['0.weight'] != again['0.weight']).any()
