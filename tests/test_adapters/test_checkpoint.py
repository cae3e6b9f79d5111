"""Adapter files: what they hold, what they fit, what is refused."""

import copy

import pytest
import torch
from torch import nn

from lors_plugin.adapters import (
    AdapterFileError,
    adapter_checkpoint,
    adapters_of,
    fingerprint,
    inject_adapters,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
    remove_adapters,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.checkpoints import (
    ConversionError,
    load_checkpoint_file,
    save_checkpoint_file,
)
from lors_plugin.testing import randomize


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self, depth=2, classes=3):
        super().__init__()
        self.backbone = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.backbone(x))


OPTIONS = dict(targets=[r'\d\.fc1'], scale=0.5, hidden_dims=4)


def base(seed=0, **kwargs):
    return randomize(Net(**kwargs), seed).eval()


def task(seed, **options):
    """An adapter file of a model, and what the model computes."""
    model = base()
    options = {**OPTIONS, **options}
    inject_adapters(model, **options)
    random = randomize(copy.deepcopy(model), seed).state_dict()
    checkpoint = adapter_checkpoint(model, options)
    for key, value in checkpoint['state_dict'].items():
        if not key.endswith('scale'):
            value.copy_(random[key])
    model.load_state_dict(checkpoint['state_dict'], strict=False)
    return checkpoint, model.eval()


X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.fixture
def file():
    return task(1)[0]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) for k in one)


def test_a_file_holds_what_is_trained(file, tmp_path):
    keys = ('down_weight', 'down_bias', 'up_weight', 'up_bias', 'scale')
    wanted = {
        f'backbone.{i}.fc1.rep_adapter.{k}' for i in (0, 1) for k in keys
    }
    wanted |= {'head.weight', 'head.bias'}
    assert file['state_dict'].keys() == wanted
    meta = file['meta'][META]
    assert meta['keys'] == sorted(wanted)
    assert meta['options'] == OPTIONS
    assert meta['fingerprint'] == fingerprint(base(), meta['keys'])
    save_checkpoint_file(file, tmp_path / 'a.pth')
    assert is_adapter_checkpoint(load_checkpoint_file(tmp_path / 'a.pth'))


def test_a_file_makes_the_model_anew(tmp_path):
    file, model = task(1, trainable=[r'\d\.norm'])
    save_checkpoint_file(file, tmp_path / 'a.pth')
    other = base()
    report = load_adapter_checkpoint(other, tmp_path / 'a.pth')
    assert report.adapted == ['backbone.0.fc1', 'backbone.1.fc1']
    assert same(model, other)
    assert torch.equal(model(X), other(X))
    for one, two in zip(model.named_parameters(), other.named_parameters()):
        assert one[0] == two[0]
        assert one[1].requires_grad == two[1].requires_grad, one[0]
    again = adapter_checkpoint(other, OPTIONS)
    assert again['meta'][META]['base'] == file['meta'][META]['base']


def test_adapters_that_are_there_are_filled(file):
    model = base()
    inject_adapters(model, **{**OPTIONS, 'scale': 3.0})
    load_adapter_checkpoint(model, file)
    assert same(model, task(1)[1])


def test_several_in_turn_on_one_base():
    """With norms or without, of any width: the base is never lost."""
    tasks = [
        task(1),
        task(2, trainable=[r'\d\.norm']),
        task(3, hidden_dims=8, targets=[r'1\.fc[12]']),
    ]
    model, untouched = base(), base()
    for index in (0, 1, 2, 1, 1, 0):
        file, wanted = tasks[index]
        load_adapter_checkpoint(model, file)
        assert same(model, wanted), index
        assert torch.equal(model(X), wanted(X)), index
    assert len(remove_adapters(model)) == 2
    assert same(model, untouched)
    assert torch.equal(model(X), untouched(X))
    assert remove_adapters(model) == []


def test_a_detector_with_shared_stages(tiny_detector):
    """Its convolutions are adapted; the file holds neck and decoder too."""
    untouched = tiny_detector('lors', seed=1)
    model, other = copy.deepcopy(untouched), copy.deepcopy(untouched)
    inject_adapters(
        model, targets=[r'layer[234]\.0\.downsample\.0'], hidden_dims=4
    )
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param))
    file = adapter_checkpoint(model)
    base_keys = file['meta'][META]['base']
    assert all(key.startswith('backbone.') for key in base_keys)
    assert 'backbone.layer2.0.bn1.running_mean' in base_keys
    load_adapter_checkpoint(other, file)
    assert same(model, other)
    remove_adapters(other)
    assert same(other, untouched)


def test_taking_fresh_adapters_off():
    model = base()
    inject_adapters(model, **OPTIONS)
    remove_adapters(model)
    assert same(model, base())
    assert not adapters_of(model)
    assert torch.equal(model(X), base()(X))


def refused(model, file, match):
    before = copy.deepcopy(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterFileError, match=match):
        load_adapter_checkpoint(model, file)
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert grads == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    'model, match',
    [
        (base(1), r'another base:\s+\d+ of 18 entries have other values'),
        (base().half(), r'16 have another .*file float32 .*, model float16'),
        (base(depth=3), 'lacks 0 of its entries .* has 9 others'),
        (
            base(classes=5),
            r'head.weight \(file float32 \(3, 8\), model float32 \(5, 8\)\)',
        ),
        (nn.Sequential(base()), r'entries are unknown to it \(head'),
    ],
    ids=['values', 'type', 'depth', 'classes', 'prefix'],
)
def test_another_base(model, match, file):
    refused(model, file, f'(?s){match}')


def test_one_changed_layer_is_named(file):
    model = base()
    model.backbone[1].fc2.bias.data[0] += 1e-6
    refused(model, file, r'(?s)1 of 18 entries.*: backbone.1.fc2.bias')


def test_other_adapters(file):
    model = base()
    inject_adapters(model, **{**OPTIONS, 'hidden_dims': 8})
    refused(model, file, 'hidden_dims or groups differ.*remove_adapters')
    remove_adapters(model)
    inject_adapters(model, **{**OPTIONS, 'targets': [r'0\.fc1']})
    refused(model, file, '1 layers are adapted on one side only: backbone.1')


def nan(file):
    file['state_dict']['head.bias'][1] = float('nan')


def lost(file):
    del file['state_dict']['backbone.1.fc1.rep_adapter.scale']


def unlisted(file):
    file['state_dict']['backbone.0.fc2.bias'] = torch.zeros(8)


def lost_and_unlisted(file):
    lost(file)
    file['meta'][META]['keys'] = sorted(file['state_dict'])


def edited(file):
    file['meta'][META]['base'].popitem()


def newer(file):
    file['meta'][META]['version'] = 3


def strange(file):
    file['meta'][META]['adapters']['backbone.0.fc1']['alpha'] = 1


def empty(file):
    file['meta'][META].pop('adapters')


def integers(file):
    key = 'backbone.1.fc1.rep_adapter.up_weight'
    file['state_dict'][key] = file['state_dict'][key].long()


def integer_head(file):
    file['state_dict']['head.bias'] = torch.zeros(3, dtype=torch.int64)


def numbered(file):
    file['state_dict'][0] = file['state_dict'].pop('head.bias')
    file['meta'][META]['keys'] = list(file['state_dict'])


def numbered_base(file):
    file['meta'][META]['base'][7] = 'float32 () 0123456789abcdef'


def no_tensor(file):
    file['state_dict']['head.bias'] = [0.0, 0.0, 0.0]


def sparse(file):
    file['state_dict']['head.bias'] = torch.zeros(3).to_sparse()


def no_values(file):
    file['state_dict']['head.bias'] = torch.zeros(3, device='meta')


def no_options(file):
    file['meta'][META]['adapters']['backbone.0.fc1'] = None


def huge(file):
    """Petabytes, if they were made before they are compared."""
    options = file['meta'][META]['adapters']['backbone.0.fc1']
    options.update(embed_dims=10**8, hidden_dims=10**8)


def huge_head(file):
    file['state_dict']['head.bias'] = torch.zeros(1).expand(10**15)


def negative(file):
    file['meta'][META]['adapters']['backbone.0.fc1']['hidden_dims'] = -4


def no_meta(file):
    file['meta'] = None


def no_field(file):
    file['meta'][META] = None


def no_state(file):
    file['state_dict'] = None


def vague(file):
    file['meta'][META]['base']['backbone.0.fc1.weight'] = 'float32'


def whole(file):
    del file['meta'][META]


@pytest.mark.parametrize(
    'damage, match',
    [
        (nan, 'head.bias has elements that are not finite'),
        (lost, '1 of its weights are missing.*backbone.1.fc1.rep_adapter'),
        (unlisted, '1 of its weights .* not listed.*backbone.0.fc2.bias'),
        (lost_and_unlisted, 'lacks backbone.1.fc1.rep_adapter.scale'),
        (edited, 'fingerprint does not fit'),
        (newer, 'format version 3, this lors_plugin reads versions .1, 2.'),
        (strange, 'adapter of backbone.0.fc1:.*alpha'),
        (empty, 'has no adapters'),
        (integers, r'1.fc1.rep_adapter.up_weight is torch.int64, not float'),
        (integer_head, r'head.bias \(file int64 \(3,\), model float32'),
        (numbered, '0 is not the name of a weight'),
        (numbered_base, '7 is not the name of a weight'),
        (no_tensor, 'head.bias is not a dense tensor'),
        (sparse, 'head.bias is not a dense tensor'),
        (no_values, 'head.bias is not a dense tensor'),
        (no_options, 'adapter of backbone.0.fc1'),
        (huge, 'lacks backbone.0.fc1.rep_adapter.* or in another shape'),
        (huge_head, r'head.bias \(file float32 \(1000000000000000,\)'),
        (negative, 'backbone.0.fc1: hidden_dims=-4'),
        (no_meta, 'no adapter file'),
        (no_field, 'format version None'),
        (no_state, 'no state_dict'),
        (vague, "backbone.0.fc1.weight of the base as 'float32'"),
        (whole, 'no adapter file.*whole models'),
    ],
)
def test_damaged_files(damage, match, file):
    damage(file)
    refused(base(), file, match)


def test_truncated_file(file, tmp_path):
    path = tmp_path / 'a.pth'
    save_checkpoint_file(file, path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ConversionError, match=r'a\.pth'):
        load_adapter_checkpoint(base(), path)


def test_no_adapters_no_file():
    with pytest.raises(ValueError, match='has no adapters'):
        adapter_checkpoint(base())
    assert not is_adapter_checkpoint(dict(state_dict={}))
    assert not is_adapter_checkpoint(None)
