"""Which weights tools/reparam.py reads and writes, and what it refuses."""

import re
from pathlib import Path

import pytest
import reparam
import torch

from lors_plugin.checkpoints.files import checkpoint_writer


@pytest.fixture
def folder(hosts, tmp_path, monkeypatch):
    """A trained ViT in the current directory: vit.py, vit.pth and others."""
    monkeypatch.chdir(tmp_path)
    hosts.make('vit', tmp_path)
    return tmp_path


@pytest.fixture
def run(folder):
    """Run the tool fast; a list of its outputs."""

    def make(*argv):
        try:
            return reparam.main(
                [*argv, '--shape', '32', '32', '--repeats', '0']
            )
        except SystemExit as error:
            return error.code

    return make


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def same(one, other):
    keys = one.keys() == other.keys()
    return keys and all(one[key].equal(other[key]) for key in one)


def change(path, **entries):
    content = torch.load(path, weights_only=True)
    torch.save(dict(content, **entries), path)


def test_averaged_weights_are_taken(run):
    """MMEngine writes them as the state dict, the plain ones beside."""
    assert run('vit.py', 'vit.pth', 'wanted.pth') == 0
    mean = weights('vit.pth')
    plain = {f'module.{k}': v.clone() for k, v in mean.items()}
    plain['module.head.layers.head.bias'] += 1
    change('vit.pth', ema_state_dict=dict(plain, steps=torch.tensor(3)))
    assert run('vit.py', 'vit.pth', 'ema.pth') == 0
    assert run('vit.py', 'vit.pth', 'plain.pth', '--no-ema') == 0
    assert same(weights('ema.pth'), weights('wanted.pth'))
    key = 'head.layers.head.bias'
    gap = weights('plain.pth')[key] - weights('ema.pth')[key]
    assert torch.allclose(gap, torch.ones(()))


def test_half_precision_is_rounded_once(run):
    assert run('vit.py', 'vit.pth', 'o.pth') == 0
    assert run('vit.py', 'vit.pth', 'h.pth', '--dtype', 'float16') == 0
    full, half = weights('o.pth'), weights('h.pth')
    assert {v.dtype for v in half.values()} == {torch.float16}
    assert all(torch.equal(half[k], full[k].half()) for k in full)


def test_safetensors(run):
    safetensors = pytest.importorskip('safetensors.torch')
    assert run('vit.py', 'vit.pth', 'o.pth') == 0
    safetensors.save_file(weights('vit.pth'), 'vit.safetensors')
    assert run('vit.py', 'vit.safetensors', 'o.safetensors', '--force') == 0
    assert same(safetensors.load_file('o.safetensors'), weights('o.pth'))
    assert Path('o.py').is_file()
    adapters = ['--adapter', 'adapter.pth', '--base', 'base.pth']
    assert run('vit.py', 'out', *adapters) == 0
    content = torch.load('adapter.pth', weights_only=True)
    checkpoint_writer('a.safetensors', content)(Path('a.safetensors'))
    adapters[1] = 'a.safetensors'
    assert run('vit.py', 'out', *adapters) == 0
    merged = safetensors.load_file('out/a.safetensors')
    assert same(merged, weights('out/adapter.pth'))


def original(state):
    """The same adapters as another program names and shapes them."""
    names = dict(down='conv_A', up='conv_B')
    made = {}
    for key, value in state.items():
        prefix, _, own = key.partition('.rep_adapter.')
        side, _, part = own.partition('_')
        if side in names:
            layer = prefix.split('.')[2]
            kind = 'attn' if '.attn.' in prefix else 'mlp'
            value = value[..., None] if part == 'weight' else value
            key = f'blocks.{layer}.adapter_{kind}.{names[side]}.{part}'
            made[key] = value
        elif key.startswith('head'):
            made[key] = value
    return made


RENAME = [
    '--rename', r'blocks\.(\d)\.adapter_attn',
    r'backbone.layers.\1.attn.qkv.rep_adapter',
    '--rename', r'blocks\.(\d)\.adapter_mlp',
    r'backbone.layers.\1.ffn.layers.0.0.rep_adapter',
]  # fmt: skip


def test_original_layout(run, capsys):
    """With the scale of the task, which the files do not hold."""
    assert run('vit.py', 'vit.pth', 'wanted.pth') == 0
    torch.save(original(weights('vit.pth')), 'foreign.pth')
    rest = ['--adapter', 'foreign.pth', '--base', 'base.pth', *RENAME]
    assert run('vit.py', 'out', *rest) == 0
    assert 'not checked' in capsys.readouterr().out
    assert same(weights('out/foreign.pth'), weights('wanted.pth'))
    # Without the hook all is told from the file; the scale was 1.
    bare = ['--cfg-options', 'custom_hooks=[]']
    assert run('vit.py', 'other', *rest, *bare) == 2
    assert 'give --scale' in capsys.readouterr().err
    assert run('vit.py', 'other', *rest, *bare, '--scale', '1') == 0
    assert same(weights('other/foreign.pth'), weights('wanted.pth'))
    assert run('vit.py', 'twice', *rest, '--scale', '2') == 0
    assert not same(weights('twice/foreign.pth'), weights('wanted.pth'))
    assert run('vit.py', *rest, *bare, '--scale', '1', '--to-peft', 'a') == 0
    assert run('vit.py', 'vit.pth', '--to-peft', 'b') == 0
    config = 'adapter_config.json'
    assert Path('a', config).read_text() == Path('b', config).read_text()
    # Entries of the header are in any order.
    safetensors = pytest.importorskip('safetensors.torch')
    names = [f'{x}/adapter_model.safetensors' for x in 'ab']
    assert same(*map(safetensors.load_file, names))


def damaged(case):
    """Break a file and return the arguments that meet it."""
    argv = ['vit.py', 'vit.pth', 'o.pth']
    adapter = ['vit.py', 'out', '--adapter', 'adapter.pth', '--base']
    if case == 'truncated':
        path = Path('vit.pth')
        path.write_bytes(path.read_bytes()[:-2000])
    elif case in ('nan', 'inf'):
        state = weights('vit.pth')
        state['backbone.layers.0.ln1.weight'][3] = float(case)
        change('vit.pth', state_dict=state)
    elif case == 'missing':
        argv[1] = 'nowhere.pth'
    elif case == 'no config':
        argv[0] = 'nowhere.py'
    elif case == 'exists':
        Path('o.py').write_text('mine')
    elif case == 'reads and writes':
        argv[2] = 'vit.pth'
    elif case == 'weights named as a config':
        argv[2] = 'o.py'
    elif case == 'no directory':
        argv = ['vit.py', 'vit.py', *adapter[2:], 'base.pth']
    elif case == 'no adapters':
        argv[1] = 'base.pth'
    elif case == 'nothing merges':
        argv[1:2] = ['base.pth']
        argv += ['--cfg-options', 'custom_hooks=[]']
    elif case == 'adapters alone':
        argv[1] = 'adapter.pth'
    elif case == 'another base':
        state = weights('base.pth')
        state['backbone.layers.1.attn.proj.weight'] *= 2
        torch.save(state, 'other.pth')
        argv = [*adapter, 'other.pth']
    elif case == 'no base':
        argv = [*adapter, 'nowhere.pth']
    elif case == 'two scales':
        argv += ['--scale', '2']
    elif case == 'half a base':
        state = weights('base.pth')
        del state['backbone.layers.1.attn.proj.weight']
        torch.save(state, 'half.pth')
        argv = [*adapter, 'half.pth']
    elif case == 'no image':
        Path('a.png').write_text('text')
        argv += ['--images', 'a.png']
    return argv


MESSAGES = {
    'truncated': 'vit.pth cannot be read',
    'nan': 'vit.pth: 1 of 52 weights hold NaN.*backbone.layers.0.ln1.weight',
    'inf': 'vit.pth: 1 weights .*not finite, backbone.layers.0.ln1.weight',
    'missing': 'nowhere.pth is not there',
    'no config': 'no config nowhere.py',
    'exists': 'o.py exists; --force',
    'reads and writes': 'vit.pth is read too',
    'weights named as a config': 'o.py would be both weights and config',
    'no directory': 'vit.py is a file; OUT needs a directory',
    'no adapters': 'base.pth does not fit .* lacks 20 ',
    'nothing merges': 'nothing in this model merges',
    'adapters alone': '--adapter adapter.pth --base BASE',
    'another base': 'adapter.pth: these .* another base:\n.*attn.proj.weight',
    'no base': 'nowhere.pth is not there',
    'half a base': '--base half.pth lacks 1 .*attn.proj.weight',
    'two scales': '--scale is for .*rep_adapter.scale=1 ',
    'no image': 'a.png',
}


@pytest.mark.parametrize('case', MESSAGES)
def test_refused_with_nothing_written(run, folder, capsys, case):
    argv = damaged(case)
    before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert run(*argv) == 2
    text = capsys.readouterr().err
    assert re.search(MESSAGES[case], text), text
    assert 'Traceback' not in text and text.count('error:') == 1
    after = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert after == before


def test_difference_above_tolerance(run, folder, capsys):
    before = sorted(folder.iterdir())
    assert run('vit.py', 'vit.pth', 'o.pth', '--tolerance', '1e-12') == 1
    captured = capsys.readouterr()
    assert 'largest difference of raw outputs' in captured.out
    assert 'nothing was written' in captured.err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('kind', [OSError, RuntimeError])
def test_full_disk(run, folder, monkeypatch, capsys, kind):
    assert run('vit.py', 'vit.pth', 'o.pth') == 0
    before = {p: p.read_bytes() for p in folder.iterdir()}

    def full_disk(content, target):
        target.write_bytes(b'half of')
        raise kind('No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    assert run('vit.py', 'vit.pth', 'o.pth', '--force') == 2
    assert 'No space left' in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
