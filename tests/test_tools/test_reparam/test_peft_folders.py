"""tools/reparam.py from and to folders of PEFT."""

import json
from pathlib import Path

import pytest
import reparam
import torch
from mmengine.config import Config

from lors_plugin.reparam.structure import build_base

peft = pytest.importorskip('peft')
FILES = ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
SEPARATE = ['--adapter', 'adapter.pth', '--base', 'base.pth']


@pytest.fixture(scope='module')
def made(hosts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('peft')
    return folder, hosts.make('vit', folder).eval()


@pytest.fixture
def run(made, monkeypatch):
    """Run the tool where the files are; its exit code."""
    monkeypatch.chdir(made[0])

    def make(*argv):
        try:
            return reparam.main(
                [*argv, '--shape', '32', '32', '--repeats', '0']
            )
        except SystemExit as error:
            return error.code

    return make


def listed(folder):
    return sorted(path.name for path in Path(folder).iterdir())


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def close(model, other):
    """Compare features and scores."""
    for run in ('extract_feat', '__call__'):
        torch.testing.assert_close(
            getattr(model, run)(X), getattr(other, run)(X)
        )


def base(path='vit.py', weights='base.pth'):
    model = build_base(Config.fromfile(path))
    model.load_state_dict(torch.load(weights)['state_dict'])
    return model


def test_there_and_back(run, made, capsys):
    assert run('vit.py', *SEPARATE, '--to-peft', 'a', '--base-name', 'b') == 0
    assert '4 adapters as a LoRA' in capsys.readouterr().out
    assert listed('a') == FILES
    # The same from the whole checkpoint.
    assert run('vit.py', 'vit.pth', '--to-peft', 'whole') == 0
    configs = [
        json.loads(Path(name, FILES[1]).read_text()) for name in ('a', 'whole')
    ]
    assert configs[0].pop('base_model_name_or_path') == 'b'
    assert configs[1].pop('base_model_name_or_path') is None
    assert configs[0] == configs[1]
    stock = peft.PeftModel.from_pretrained(base(), 'a').eval()
    close(stock.base_model.model, made[1])

    # A folder is an adapter file like any other.
    argv = ['vit.py', 'out', '--adapter', 'a', 'adapter.pth']
    assert run(*argv, '--base', 'base.pth') == 0
    assert listed('out') == ['a.pth', 'a.py', 'adapter.pth', 'adapter.py']
    close(base('out/a.py', 'out/a.pth'), made[1])


def test_a_part_and_several_files(run, made, capsys):
    Path('second.pth').write_bytes(Path('adapter.pth').read_bytes())
    argv = ['vit.py', '--adapter', 'adapter.pth', 'second.pth']
    argv += ['--base', 'base.pth', '--part', 'backbone']
    assert run(*argv, '--to-peft', 'parts') == 0
    output = capsys.readouterr().out
    assert 'left out are 2 trained weights outside of backbone' in output
    assert listed('parts') == ['adapter', 'second']
    stock = base()
    stock.backbone = peft.PeftModel.from_pretrained(
        stock.backbone, 'parts/adapter'
    )
    stock.head = made[1].head
    close(stock.eval(), made[1])
    # Merged into the base, whose head is not the trained one.
    argv = ['vit.py', 'merged', '--from-peft', 'parts/adapter']
    argv += ['--base', 'base.pth', '--part', 'backbone']
    assert run(*argv) == 0
    merged = base('merged/adapter.py', 'merged/adapter.pth')
    assert merged.head.layers.head.bias.equal(base().head.layers.head.bias)
    merged.head = made[1].head
    close(merged, made[1])


@pytest.mark.parametrize(
    ('argv', 'code', 'match'),
    [
        (['vit.pth', '--to-peft', 'again'], 2, 'exists; --force overwrites'),
        (['vit.pth', '--to-peft', 'again', '--force'], 0, ''),
        (['vit.pth', 'o.pth', '--to-peft', 'x'], 2, 'CHECKPOINT and --to-p'),
        ([*SEPARATE, 'o', '--to-peft', 'x'], 2, 'give CONFIG and --base'),
        ([*SEPARATE, '--to-peft', 'vit.py'], 2, 'vit.py is a file; OUT'),
        (['vit.pth', 'o.pth', '--part', 'a'], 2, '--part needs --to-peft or'),
        (['vit.pth', 'o.pth', '--base-name', 'a'], 2, 'needs --to-peft'),
        (
            ['o', '--from-peft', 'again', *SEPARATE[2:], '--part', 'head'],
            2,
            'again: these adapters belong to another base',
        ),
        (['base.pth', '--to-peft', 'x'], 2, 'does not fit the model'),
        (
            [*SEPARATE, '--to-peft', 'x', '--part', 'head'],
            2,
            'is adapted, and PEFT adapts layers inside of head',
        ),
        (['again', 'o.pth'], 2, 'again is a directory; name a file in it'),
    ],
)
def test_wrong_calls(run, made, capsys, argv, code, match):
    if not Path('again').exists():
        assert run('vit.py', 'vit.pth', '--to-peft', 'again') == 0
    before = sorted(map(str, Path().rglob('*')))
    assert run('vit.py', *argv) == code
    assert match in capsys.readouterr().err
    assert sorted(map(str, Path().rglob('*'))) == before
