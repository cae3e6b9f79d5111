"""When code that PyTorch does not see may compute."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lors_plugin.ops.bare import are_bare

FLOAT = (torch.float32,)


def bare(*tensors):
    return are_bare(tensors, FLOAT)


def test_numbers_in_memory():
    x = torch.randn(2, 3)
    assert bare() and bare(x) and bare(x.T, nn.Parameter(x))
    assert are_bare([x, x.double()], (torch.float64, torch.float32))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    'other',
    [
        torch.randn(2).double(),
        torch.randn(2, device='meta'),
        torch._neg_view(torch.randn(2)),
        torch._efficientzerotensor(2),
        torch.randn(2).as_subclass(Subclass),
        FakeTensorMode().from_tensor(torch.randn(2)),
    ],
    ids=['double', 'meta', 'negative', 'zero', 'subclass', 'fake'],
)
def test_what_stands_for_numbers(other):
    assert not bare(torch.randn(2), other)


def test_nobody_may_watch():
    x = torch.randn(2, 3)
    seen = []

    def look(x):
        seen.append(bare(x))
        return x + 0

    with FlopCounterMode(display=False):
        look(x)
    with forward_ad.dual_level():
        look(x)
    torch.jit.trace(look, (x,), check_trace=False)
    torch.func.functionalize(look)(x)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.compile(look, backend='eager')(x)
    assert seen == [False] * 7
    assert bare(x)
