"""Folders of PEFT: written for stock PEFT, and read from it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from lors_plugin.adapters import (
    PeftError,
    adapter_checkpoint,
    adapters_of,
    inject_adapters,
    load_adapter_checkpoint,
    load_peft,
    read_peft,
    remove_adapters,
    to_peft,
    write_peft,
)
from lors_plugin.checkpoints import ConversionError
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

peft = pytest.importorskip('peft')
safetensors = pytest.importorskip('safetensors.torch')

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
KEY = 'base_model.model.'


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ('query', 'key', 'value'):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        weights = self.query(x) @ self.key(x).transpose(-1, -2)
        return weights.softmax(-1) @ self.value(x)


class Net(nn.Module):
    """Every kind of layer that PEFT adapts, and names with equal ends."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.attn = Attention()
        self.ffn = nn.Sequential(nn.Linear(8, 12), nn.GELU())
        self.free = nn.Linear(12, 8, bias=False)
        self.inner = nn.ModuleDict(dict(ffn=nn.Sequential(nn.Linear(8, 8))))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.point(self.norm(self.stem(x)).relu())
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        x = self.inner['ffn'](x + self.free(self.ffn(x)))
        return self.head(self.mha(x, x, x)[0].mean(1))


X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(3))
ALL = dict(
    rep_adapter=dict(
        targets=['stem', 'point', 'attn', r'ffn\.0'], hidden_dims=4,
        scale=0.7, trainable=['norm', 'head'],
    ),
    lora=dict(
        targets=['stem', 'point', 'attn', r'ffn\.0', 'free'], method='lora',
        rank=4, alpha=6, trainable=['head'], rank_pattern={'stem': 2},
        alpha_pattern={'query': 3},
    ),
)  # fmt: skip


@pytest.fixture
def base():
    torch.manual_seed(0)
    return randomize(Net()).eval()


def adapted(base, **options):
    """A copy with adapters, all that is trained changed at random."""
    model = copy.deepcopy(base)
    inject_adapters(model, '', **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=rng)
                param.add_(0.3 * noise.to(param.dtype))
        if model.norm.weight.requires_grad:
            model.norm.running_mean.add_(1)
    return model.eval()


@torch.no_grad()
def close(model, other, x=X):
    torch.testing.assert_close(model(x), other(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('method', ALL)
def test_stock_peft_loads_runs_and_merges_it(base, tmp_path, method):
    model = adapted(base, **ALL[method])
    if method == 'rep_adapter':
        adapters_of(model)['point'].scale.fill_(0.2)
    adapter = to_peft(model, base_name='hub/base')
    write_peft(adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config['base_model_name_or_path'] == 'hub/base'
    ranks = {'^stem': 36} if method == 'rep_adapter' else {'^stem': 2}
    alphas = {
        'rep_adapter': {'^stem': 25.2, '^point': 0.8},
        'lora': {r'^attn\.query': 3},
    }
    assert (config['r'], config['rank_pattern']) == (4, ranks)
    assert config['alpha_pattern'] == alphas[method]
    assert config.get('lora_bias', False) == (method == 'rep_adapter')
    # By their ends, `ffn.0` would mean `inner.ffn.0` too.
    assert isinstance(config['target_modules'], str)
    stock = copy.deepcopy(base)
    stock = peft.PeftModel.from_pretrained(stock, tmp_path).eval()
    close(stock, model)
    with stock.disable_adapter():
        close(stock, base)
    close(stock.merge_and_unload(), model)

    back = copy.deepcopy(base)
    report = load_peft(back, tmp_path)
    assert len(report.adapted) == len(config['target_modules'].split('|'))
    close(back.eval(), model)
    other = copy.deepcopy(base)
    load_adapter_checkpoint(other, adapter_checkpoint(back))
    close(other.eval(), model)
    reparameterize(other)
    close(other, model)
    remove_adapters(back)
    for key, value in base.state_dict().items():
        assert back.state_dict()[key].equal(value), key


def test_the_model_card(base, tmp_path):
    model = adapted(base, **ALL['rep_adapter'])
    write_peft(to_peft(model, base_name='hub/base'), tmp_path)
    card = (tmp_path / 'README.md').read_text()
    assert 'base_model: hub/base' in card and 'library_name: peft' in card
    assert '6 layers, attn.key to stem' in card
    assert 'modules trained with them: head, norm' in card
    meta = adapter_checkpoint(model)['meta']['lors_plugin_adapter']
    assert meta['fingerprint'] in card


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(base, dtype):
    model = adapted(copy.deepcopy(base).to(dtype), **ALL['lora'])
    adapter = to_peft(model, dtype=dtype)
    assert {v.dtype for v in adapter.state.values()} == {dtype}
    back = copy.deepcopy(base).to(dtype)
    load_peft(back, adapter)
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[key].equal(theirs[key]) for key in mine)


def test_a_part_of_a_model(base, tmp_path):
    """PEFT gets the network inside; the head outside is named."""
    whole = nn.ModuleDict(dict(net=base, head=nn.Linear(3, 2)))
    inject_adapters(whole, 'net', **ALL['rep_adapter'])
    randomize(whole)
    adapter = to_peft(whole, 'net')
    assert adapter.notes == [
        'left out are 2 trained weights outside of net: head.bias, head.weight'
    ]
    stock = copy.deepcopy(whole['net'])
    remove_adapters(stock)
    nn.init.zeros_(stock.head.weight)
    stock.norm.reset_running_stats()
    write_peft(adapter, tmp_path)
    stock = peft.PeftModel.from_pretrained(stock, tmp_path).eval()
    close(stock, whole['net'].eval())


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(targets='mha'), r'mha: MultiheadAttention reads .*merge it'),
        (dict(targets='free'), r'free: it has no bias, .*use method='),
        (dict(method='bitfit'), "no adapters.*method='bitfit'.*merge"),
        (dict(method='norm'), 'no adapters'),
        (dict(method='linear_probe', trainable='head'), 'no adapters'),
        (
            dict(targets='point', trainable=r'point\.weight'),
            'point.weight was trained, and PEFT saves whole',
        ),
        (
            dict(targets=r'inner\.ffn\.0', trainable=r'ffn\.0'),
            r'inner\.ffn\.0 \(by the end of its name, ffn\.0\) was trained',
        ),
    ],
)
def test_what_peft_cannot_hold_is_named(base, options, match):
    with pytest.raises(PeftError, match=match):
        to_peft(adapted(base, **options))


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(kernel_size=3, dilation=2), 'PEFT ignores the dilation'),
        (
            dict(kernel_size=3, padding=1, padding_mode='reflect'),
            "PEFT ignores padding_mode='reflect'",
        ),
    ],
)
def test_convolutions_that_peft_computes_otherwise(changes, match):
    model = nn.Sequential(nn.Conv2d(4, 8, **changes))
    inject_adapters(model, '', ['0'])
    with pytest.raises(PeftError, match=match):
        to_peft(randomize(model))


def test_layers_that_are_shared():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict(dict(a=nn.Sequential(layer)))
    model['b'] = nn.Sequential(layer)
    inject_adapters(model, '', [r'a\.0'])
    with pytest.raises(PeftError, match=r'a.0: it is b\.0 too'):
        to_peft(randomize(model))


@pytest.fixture
def theirs(base, tmp_path):
    """A folder that PEFT wrote, and PEFT's model."""

    def make(**options):
        options = {
            'target_modules': r'stem|point|attn\.(query|value)|ffn\.0',
            'r': 4, 'lora_alpha': 6, 'init_lora_weights': False,
            'modules_to_save': ['head'], **options,
        }  # fmt: skip
        torch.manual_seed(2)
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**options)
        )
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.requires_grad and 'lora' not in name:
                    param.add_(0.3 * torch.randn_like(param))
        model.save_pretrained(tmp_path)
        return SimpleNamespace(folder=tmp_path, model=model.eval())

    return make


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(target_modules=['query', 'stem', 'free'], modules_to_save=None),
        dict(use_rslora=True, rank_pattern={'ffn.0': 2, 'query': 8},
             alpha_pattern={'query': 1.5}),
        dict(bias='lora_only'),
        dict(bias='all', lora_bias=True),
        dict(target_modules=r'.*\.query', exclude_modules=['x'],
             init_lora_weights='gaussian'),
    ],
)  # fmt: skip
def test_their_lora_runs_and_merges(base, theirs, options):
    made = theirs(**options)
    model = copy.deepcopy(base)
    load_peft(model, made.folder)
    close(model.eval(), made.model)
    assert reparameterize(model) > 0
    close(model, made.model)


def test_their_lora_is_trained_further(base, theirs, tmp_path):
    made = theirs(lora_dropout=0.25, rank_pattern={'query': 2})
    model = copy.deepcopy(base)
    report = inject_adapters(
        model, '', method='lora', peft=made.folder, trainable='norm'
    )
    adapters = adapters_of(model)
    assert {adapter.dropout for adapter in adapters.values()} == {0.25}
    assert len(adapters['attn.query'].A) == 2
    close(model.eval(), made.model)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert {'head.bias', 'norm.weight', 'stem.lora.A'} <= trained
    assert 'stem.weight' not in trained
    assert report.adapted == list(adapters)


class Start(Hook):
    """Keep the model as training starts."""

    def before_train_epoch(self, runner):
        if not hasattr(self, 'model'):
            self.model = copy.deepcopy(runner.model)


def test_the_hook_starts_from_their_lora(tiny, tmp_path):
    torch.manual_seed(5)
    base = tiny.Model()
    config = peft.LoraConfig(
        target_modules=['used'], r=2, init_lora_weights=False,
        modules_to_save=['0.unused'],
    )  # fmt: skip
    made = peft.get_peft_model(base.backbone, config)
    made.save_pretrained(tmp_path / 'lora')
    saved = safetensors.load_file(tmp_path / 'lora' / WEIGHTS)
    options = dict(method='lora', peft=str(tmp_path / 'lora'))
    start = Start()
    runner = tiny.make(
        tmp_path, 'a', 1, dict(options, adapter_only=True), hooks=[start]
    )
    trained = runner.train()
    model = start.model
    for layer, adapter in adapters_of(model).items():
        key = f'{KEY}{layer.removeprefix("backbone.")}.lora_A.weight'
        assert adapter.A.equal(saved[key])
    own = model.backbone[0].unused
    assert own.weight.equal(saved[f'{KEY}0.unused.weight'])
    assert own.weight.requires_grad
    assert not model.backbone[1].unused.weight.requires_grad
    # A resumed run goes on from its own weights.
    start = Start()
    runner = tiny.make(
        tmp_path, 'b', 2, dict(options, adapter_only=True), hooks=[start]
    )
    runner._resume = True
    runner._load_from = str(tmp_path / 'a' / 'epoch_1.pth')
    with torch.no_grad():
        file = torch.load(runner._load_from, weights_only=False)
        file['state_dict']['backbone.0.unused.bias'].fill_(7)
        torch.save(file, runner._load_from)
    runner.train()
    for key, value in trained.state_dict().items():
        if 'unused.bias' not in key:
            assert start.model.state_dict()[key].equal(value), key
    assert start.model.backbone[0].unused.bias.eq(7).all()


def edit(folder, **entries):
    path = folder / CONFIG
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    state = safetensors.load_file(folder / WEIGHTS)
    change(state)
    safetensors.save_file(state, folder / WEIGHTS)


def wide(folder):
    edit_weights(
        folder,
        lambda state: state.update(
            {f'{KEY}ffn.0.lora_B.weight': torch.ones(9, 4)}
        ),
    )


def not_finite(folder):
    edit_weights(folder, lambda s: s[f'{KEY}head.bias'].fill_(float('nan')))


BROKEN = {
    'dora': (lambda f: edit(f, use_dora=True), 'use_dora=True is no plain'),
    'tuner': (lambda f: edit(f, peft_type='LOHA'), "peft_type is 'LOHA'"),
    'later': (lambda f: edit(f, new_field=3), 'new_field=3 is no plain'),
    'start': (
        lambda f: edit(f, init_lora_weights='pissa'),
        "init_lora_weights='pissa' changed the weights of the base",
    ),
    'type': (lambda f: edit(f, r='four'), "r='four' has the wrong type"),
    'alpha': (
        lambda f: edit(f, lora_alpha=None),
        'lora_alpha=None has the wrong type',
    ),
    'expression': (
        lambda f: edit(f, target_modules='(stem'),
        r"target_modules: '\(stem' is no regular expression",
    ),
    'json': (lambda f: (f / CONFIG).write_text('{'), 'is no JSON'),
    'empty': (lambda f: (f / CONFIG).unlink(), 'is no folder of PEFT'),
    'pickle': (
        lambda f: (f / WEIGHTS).rename(f / 'adapter_model.bin'),
        'adapter_model.bin could run code',
    ),
    'cut': (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:90]),
        'cannot be read',
    ),
    'nan': (not_finite, 'NaN'),
    'rank': (lambda f: edit(f, r=5), 'A of its LoRA has the shape'),
    'shape': (wide, r'ffn\.0: B of its LoRA has the shape \(9, 4\)'),
    'names': (
        lambda f: edit(f, target_modules=['stem']),
        'does not name 4 of the adapted layers',
    ),
    'more names': (
        lambda f: edit(f, target_modules=r'(?!head|free).+'),
        'names 3 layers of this model that have no weights',
    ),
    'lacking': (
        lambda f: edit_weights(f, lambda s: s.pop(f'{KEY}stem.lora_A.weight')),
        r'stem: A of its LoRA has the shape None',
    ),
    'embedding': (
        lambda f: edit_weights(
            f, lambda s: s.update({f'{KEY}a.lora_embedding_A': torch.ones(1)})
        ),
        'lora_embedding_A is no weight of a plain LoRA',
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', BROKEN)
def test_broken_folders_are_refused(base, theirs, case):
    made = theirs()
    damage, match = BROKEN[case]
    damage(made.folder)
    model = copy.deepcopy(base)
    with pytest.raises((PeftError, ConversionError), match=match):
        load_peft(model, made.folder)
    assert not adapters_of(model)
    for key, value in base.state_dict().items():
        assert model.state_dict()[key].equal(value)


def test_wrong_bases_are_refused(base, theirs):
    made = theirs()
    other = copy.deepcopy(base)
    del other.attn.query
    with pytest.raises(PeftError, match=r'another base.*attn\.query'):
        load_peft(other, made.folder)
    other = copy.deepcopy(base)
    other.head = nn.Linear(8, 5)
    with pytest.raises(PeftError, match=r'head\.bias \(3,\).*classes'):
        load_peft(other, made.folder)
    whole = nn.ModuleDict(dict(net=base))
    with pytest.raises(PeftError, match='its part net has'):
        load_peft(whole, made.folder)
    load_peft(whole, made.folder, 'net')
    with pytest.raises(PeftError, match='has adapters already'):
        load_peft(whole, made.folder, 'net')


def test_options_beside_a_folder(base, theirs):
    made = theirs()
    for options, match in (
        (dict(), "give method='lora'"),
        (dict(method='lora', rank=2), 'leave out rank'),
        (dict(method='lora', targets='stem'), 'leave out targets'),
    ):
        with pytest.raises(ValueError, match=match):
            inject_adapters(base, '', peft=made.folder, **options)
        assert not adapters_of(base)


def test_a_full_disk_leaves_the_former_folder(base, tmp_path, monkeypatch):
    model = adapted(base, **ALL['lora'])
    adapter = to_peft(model)
    write_peft(adapter, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    adapter.config = dict(adapter.config, r=9)

    def full(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError, match='No space'):
        write_peft(adapter, tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert read_peft(tmp_path).config['r'] == 4
