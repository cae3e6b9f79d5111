"""Modules that know a simpler one are replaced, wherever they are."""

import copy

import pytest
import torch
from torch import nn

from lors_plugin.adapters import inject_adapters
from lors_plugin.reparam import MergeError, reparameterize, unmerge


class Doubled(nn.Module):
    """A linear layer, twice, which one can do."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Linear(8, 8) if inner is None else inner

    def forward(self, x):
        return 2 * self.inner(x)

    @torch.no_grad()
    def merged(self):
        inner = self.inner
        new = nn.Linear(8, 8, dtype=inner.weight.dtype)
        new.weight.copy_(2 * inner.weight.double())
        new.bias.copy_(2 * inner.bias.double())
        return new


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def adapt(model, *targets):
    inject_adapters(model, '', targets=list(targets))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model.eval()


@torch.no_grad()
def check(model, number):
    """Merge and back, with outputs compared; the merged model is left."""
    wanted = model(X)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert reparameterize(model) == number
    assert reparameterize(model) == 0
    merged = model(X)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    left = [type(m).__name__ for m in model.modules()]
    assert 'Doubled' not in left and 'RepAdapter' not in left
    assert unmerge(model) == number
    assert torch.equal(model(X), wanted)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    reparameterize(model)
    assert torch.equal(model(X), merged)


def test_replaced_at_every_place():
    shared = Doubled()
    model = nn.Sequential(
        shared, nn.Linear(8, 8), nn.Sequential(nn.Tanh(), shared), shared
    ).eval()
    check(model, 1)
    assert model[0] is model[2][1] is model[3]
    assert type(model[0]) is nn.Linear


def test_adapters_merge_before_the_layer_that_holds_them():
    model = nn.Sequential(Doubled(), nn.Linear(8, 8), Doubled())
    check(adapt(model, r'[02]\.inner', '1'), 5)
    assert list(model.state_dict()) == [
        f'{i}.{name}' for i in range(3) for name in ('weight', 'bias')
    ]


def test_an_adapter_of_the_replaced_layer_goes_into_the_new_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    adapt(model, '0')
    plain = model[0]
    model[0] = Doubled(nn.Linear(8, 8))
    model[0].add_module('rep_adapter', plain.rep_adapter)
    for hook in plain._forward_pre_hooks.values():
        model[0].register_forward_pre_hook(hook, with_kwargs=True)
    check(model.eval(), 2)


def test_replaced_within_replaced():
    class Outer(Doubled):
        pass

    model = nn.Sequential(Outer(Doubled()), nn.Tanh()).eval()
    check(model, 2)
    assert type(model[0]) is nn.Linear


def test_a_shared_layer_that_is_adapted_in_two_parents():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    check(adapt(model, '0'), 1)


def test_a_copy_is_unmerged_by_itself():
    model = nn.Sequential(Doubled(), nn.Tanh()).eval()
    wanted = model(X)
    reparameterize(model)
    other = copy.deepcopy(model)
    assert unmerge(other) == 1
    assert torch.equal(other(X), wanted)
    assert type(model[0]) is nn.Linear


def broken(case):
    model = nn.Sequential(nn.Linear(8, 8), Doubled(), Doubled()).eval()
    adapt(model, '0')
    if case == 'part trains':
        model[2].inner.train()
    elif case == 'nan':
        model[2].inner.weight.data[2, 3] = torch.nan
    elif case == 'overflow':
        model.half()
        model[2].inner.weight.data.fill_(6e4)
    elif case == 'meta':
        model[2].to('meta')
    elif case == 'hook':
        model[2].register_forward_hook(print)
    elif case == 'parametrized':
        nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    'case, match',
    [
        ('part trains', '2 or a part of it is in training mode'),
        ('nan', r'2\.weight: .*not finite'),
        ('overflow', r'2\.weight: .*not finite in float16'),
        ('meta', '2: .*meta device'),
        ('hook', '2: .*print.* would be lost'),
        ('parametrized', '0: its weight is computed from others'),
    ],
)
def test_refused_before_anything_is_changed(case, match):
    model = broken(case)
    modules = list(model.named_modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match=match):
        reparameterize(model)
    assert list(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_a_model_that_would_be_replaced_itself():
    with pytest.raises(MergeError, match=r'Doubled.*model\.merged\(\)'):
        reparameterize(Doubled().eval())
