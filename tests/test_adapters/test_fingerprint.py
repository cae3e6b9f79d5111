"""What of a model is the base, and when its fingerprint changes."""

import pytest
import torch
from torch import nn

from lors_plugin.adapters import fingerprint, inject_adapters
from lors_plugin.adapters.checkpoint import base_entries, trained_keys
from lors_plugin.utils import unwrapped


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.plain = nn.BatchNorm1d(8, affine=False)
        self.relative = Table()


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer('index', torch.arange(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Host(), Host())
        self.head = nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2))


@pytest.fixture
def net():
    return Net()


def adapted(net, **options):
    inject_adapters(net, targets=[r'\d\.layer'], **options)
    return net


def test_it_is_the_same_with_and_without_adapters(net):
    bare = fingerprint(net, [k for k in net.state_dict() if 'head' in k])
    adapted(net)
    assert fingerprint(net) == bare
    assert fingerprint(nn.parallel.DataParallel(net)) == bare
    assert fingerprint(torch.compile(net)) == bare
    assert len(bare) == 64


def test_head_and_adapters_do_not_count(net):
    before = fingerprint(adapted(net))
    with torch.no_grad():
        net.head[0].weight.add_(1)
        net.head[1].running_mean.add_(1)
        net.backbone[0].layer.rep_adapter.up_bias.add_(1)
        net.backbone[0].layer.rep_adapter.scale.mul_(2)
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    'key',
    ['0.layer.weight', '1.norm.running_var', '0.plain.running_mean']
    + ['1.norm.num_batches_tracked', '0.relative.index'],
)
def test_one_bit_of_the_base_counts(net, key):
    before = fingerprint(adapted(net))
    value = net.backbone.state_dict()[key].view(-1).view(torch.uint8)
    value[0] ^= 1
    assert fingerprint(net) != before
    value[0] ^= 1
    assert fingerprint(net) == before


def test_names_shapes_and_types_count():
    values = [
        dict(a=torch.zeros(2, 4)),
        dict(b=torch.zeros(2, 4)),
        dict(a=torch.zeros(4, 2)),
        dict(a=torch.zeros(2, 4, dtype=torch.int32)),
        dict(a=torch.zeros(4, 4, dtype=torch.bfloat16)),
        dict(a=torch.zeros(())),
        dict(a=torch.zeros(0)),
    ]
    entries = [tuple(base_entries(v, ()).items()) for v in values]
    assert len(set(entries)) == len(values)
    assert entries[0][0][1].startswith('float32 (2, 4) ')


def test_order_and_strides_do_not_count():
    a, b = torch.randn(3, 4), torch.randn(2)
    one = base_entries(dict(a=a, b=b), ())
    other = base_entries(dict(b=b, a=a.t().contiguous().t()), ())
    assert list(one.items()) == list(other.items())


def test_buffers_follow_their_parameters(net):
    adapted(net, trainable=[r'0\.norm'])
    trained = {k for k in trained_keys(net) if 'rep_adapter' not in k}
    norm = ('weight', 'bias')
    stats = ('running_mean', 'running_var', 'num_batches_tracked')
    wanted = {f'backbone.0.norm.{k}' for k in (*norm, *stats)}
    wanted |= {f'head.1.{k}' for k in (*norm, *stats)}
    wanted |= {'head.0.weight', 'head.0.bias'}
    # Without parameters of its own it follows those around it.
    wanted |= {f'backbone.0.plain.{k}' for k in stats}
    assert trained == wanted


def test_what_has_no_values_is_refused(net):
    with pytest.raises(
        ValueError, match='backbone.0.layer.bias is sharded or on'
    ):
        fingerprint(adapted(net.to('meta')))


def test_wrappers_come_off(net):
    assert unwrapped(torch.compile(nn.parallel.DataParallel(net))) is net
