"""AdapterBank: tasks that are switched in place, or mixed in a batch."""

import copy
import threading

import pytest
import torch
from torch import nn

from lors_plugin.adapters import (
    AdapterBank,
    AdapterFileError,
    adapter_checkpoint,
    inject_adapters,
    to_peft,
    write_peft,
)
from lors_plugin.checkpoints import save_checkpoint_file
from lors_plugin.testing import randomize


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ('query', 'key', 'value'):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        weights = self.query(x) @ self.key(x).transpose(-1, -2)
        return weights.softmax(-1) @ self.value(x)


class Net(nn.Module):
    """Images first, last in windows, and second in a sequence of tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.attn = Attention()
        self.window = nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2)
        self.late = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def features(self, x):
        x = self.norm(self.stem(x)).relu().flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        windows = x.reshape(-1, 4, 8)
        x = x + self.window(windows).view_as(x)
        tokens = x.transpose(0, 1)
        tokens = self.late(tokens + self.mha(tokens, tokens, tokens)[0])
        return tokens.mean(0)

    def forward(self, x):
        return self.head(self.features(x))


X = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
LAYERS = ['stem', 'attn', 'window', 'mha', 'late']
TASKS = dict(
    a=dict(targets=LAYERS, hidden_dims=4, scale=0.6,
           trainable=['norm', 'head']),
    b=dict(targets=LAYERS[:1] + ['late', r'attn\.value'], method='lora',
           rank=2, bias=True, trainable=['head', r'late\.bias']),
    c=dict(method='norm', trainable='head'),
    d=dict(targets=['mha', 'attn'], hidden_dims=2),
)  # fmt: skip


@pytest.fixture(scope='module')
def base():
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope='module')
def trained(base):
    """By task: the model, and the content of its adapter file."""

    def make(seed, head=None, **options):
        model = copy.deepcopy(base)
        if head is not None:
            model.head = head
        inject_adapters(model, '', **options)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.3 * torch.randn(param.shape, generator=rng))
            if model.norm.weight.requires_grad:
                model.norm.running_mean.add_(1)
        return model.eval(), adapter_checkpoint(model)

    made = {name: make(i, **TASKS[name]) for i, name in enumerate(TASKS)}
    made['e'] = make(9, nn.Linear(8, 5), targets='stem', trainable='head')
    return made


@pytest.fixture
def bank(base, trained):
    bank = AdapterBank(copy.deepcopy(base), max_merged=2)
    for name in TASKS:
        bank.add(name, trained[name][1])
    return bank


def assert_base(bank, base):
    """The very state dict, and no trace of hooks."""
    state, wanted = bank.model.state_dict(), base.state_dict()
    assert state.keys() == wanted.keys()
    assert all(state[key].equal(wanted[key]) for key in wanted)
    for module in bank.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@torch.no_grad()
def close(output, model, x=X):
    torch.testing.assert_close(output, model(x), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_switched_in_place_and_back_bit_for_bit(bank, base, trained):
    assert bank.names == list(TASKS) and bank.active is None
    params = dict(bank.model.named_parameters())
    for name in 'abcdab':
        bank.switch(name)
        assert bank.active == name
        close(bank.model(X), trained[name][0])
    bank.switch(None)
    assert_base(bank, base)
    # The very parameters: nothing was written into them.
    for key, param in bank.model.named_parameters():
        assert param is params[key]


def test_weights_that_are_kept_are_not_computed_again(bank):
    bank.switch('a')
    weight = bank.model.late.weight
    bank.switch('b')
    bank.switch('a')
    assert bank.model.late.weight is weight
    bank.switch('b')
    bank.switch('c')
    bank.switch('a')
    assert bank.model.late.weight is not weight


@torch.no_grad()
def test_a_batch_of_different_tasks(bank, base, trained):
    names = ['a', None, 'b', 'c', 'd', 'a']
    bank.switch('b')
    output = bank(X, names)
    for index, name in enumerate(names):
        model = trained[name][0] if name else base
        close(output[index : index + 1], model, X[index : index + 1])
    assert bank.active == 'b'
    # Another number of images, another size, one task, the base.
    small = X[:3, :, :4]
    output = bank(small, ['d', 'b', 'd'])
    close(output[::2], trained['d'][0], small[::2])
    close(bank(X, ['c'] * 6), trained['c'][0])
    close(bank(X, [None] * 6), base)
    bank.switch(None)
    assert_base(bank, base)


@torch.no_grad()
def test_heads_of_tasks(bank, base, trained):
    model, file = trained['e']
    with pytest.raises(AdapterFileError, match=r'head.bias .*\(5,\), model'):
        bank.add('e', file)
    assert bank.names == list(TASKS)
    bank.add('e', file, modules=dict(head=nn.Linear(8, 5)))
    with bank.using('e') as switched:
        close(switched(X), model)
    with pytest.raises(ValueError, match="task 'e' has a head of its own"):
        bank(X, ['e', *'abcd', None])
    names = ['e', 'a', 'e', None, 'b', 'e']
    features = bank(X, names, call=bank.model.features)
    for index, name in enumerate(names):
        rows = slice(index, index + 1)
        with bank.using(name, adapters=False) as part:
            scores = part.head(features[rows])
        close(scores, trained[name][0] if name else base, X[rows])
    # Now the head is reached, which no call before did.
    output = bank(X, ['a', 'b', 'c', 'd', None, 'a'])
    close(output[:1], trained['a'][0], X[:1])
    close(output[2:3], trained['c'][0], X[2:3])
    bank.remove('e')
    bank.switch(None)
    assert_base(bank, base)
    with pytest.raises(ValueError, match="no task 'e' in "):
        bank.switch('e')


@torch.no_grad()
def test_files_and_folders(base, trained, tmp_path):
    bank = AdapterBank(copy.deepcopy(base))
    path = tmp_path / 'a.pth'
    save_checkpoint_file(trained['a'][1], path)
    bank.add('a', path)
    options = dict(TASKS['a'], targets=['stem', 'attn', 'late'])
    model = copy.deepcopy(base)
    inject_adapters(model, '', **options)
    randomize(model, 3)
    model.load_state_dict(base.state_dict(), strict=False)
    write_peft(to_peft(model), tmp_path / 'peft')
    bank.add('p', tmp_path / 'peft')
    output = bank(X[:2], ['a', 'p'])
    close(output[:1], trained['a'][0], X[:1])
    close(output[1:], model.eval(), X[1:2])
    bank.switch('p')
    close(bank.model(X), model)


@torch.no_grad()
def test_threads_share_a_bank(bank, base, trained):
    wanted = {name: trained[name][0](X) for name in TASKS}
    wanted[None] = base(X)
    odd = []

    def work(seed):
        rng = torch.Generator().manual_seed(seed)
        names = [*TASKS, None]
        for _ in range(6):
            picked = [names[i] for i in torch.randint(5, (6,), generator=rng)]
            with torch.no_grad():
                with bank.using(picked[0]) as model:
                    one = model(X)
                many = bank(X, picked)
            rows = torch.stack([wanted[n][i] for i, n in enumerate(picked)])
            if (one - wanted[picked[0]]).abs().max() > 1e-3:
                odd.append(picked[0])
            if (many - rows).abs().max() > 1e-3:
                odd.append(picked)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not odd
    bank.switch(None)
    assert_base(bank, base)


class Mixing(nn.Module):
    """Tokens of all images in turn, which no slice can tell apart."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.transpose(0, 1).reshape(-1, 4))


class Pooling(Mixing):
    """All images make one."""

    def forward(self, x):
        return self.layer(x.sum(0))


@pytest.mark.parametrize('kind', [Mixing, Pooling])
def test_images_that_cannot_be_told_apart(kind):
    base = kind()
    bank = AdapterBank(copy.deepcopy(base))
    inject_adapters(base, '', targets='layer')
    bank.add('a', adapter_checkpoint(base))
    with pytest.raises(ValueError, match='layer reads is not one image after'):
        bank(torch.randn(2, 3, 4), ['a', None])
    bank.switch('a')
    assert bank(torch.randn(2, 3, 4), [None, None]) is not None


def test_wrong_calls(bank, base, trained):
    file = trained['a'][1]
    with pytest.raises(ValueError, match="'a' is no new name"):
        bank.add('a', file)
    with pytest.raises(ValueError, match='6 images have 2 tasks'):
        bank(X, ['a', 'b'])
    with pytest.raises(ValueError, match="no task 'z' in"):
        bank(X, ['z'] * 6)
    with pytest.raises(ValueError, match='has adapters already'):
        AdapterBank(trained['a'][0])
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.late.weight[0, 0] += 1
    stranger = AdapterBank(other)
    with pytest.raises(AdapterFileError, match='trained on another base'):
        stranger.add('a', file)
    assert stranger.names == []


def test_overflow_in_half_precision(base):
    model = copy.deepcopy(base).half()
    bank = AdapterBank(copy.deepcopy(model))
    inject_adapters(model, '', targets='late', scale=6e4)
    with torch.no_grad():
        model.late.rep_adapter.up_weight.fill_(9)
    with pytest.raises(ValueError, match='late: merging gives a weight'):
        bank.add('a', adapter_checkpoint(model))
    assert bank.names == [] and bank.active is None
