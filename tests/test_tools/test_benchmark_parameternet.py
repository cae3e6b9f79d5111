"""The benchmark of ParameterNet, in a size that takes no time."""

import csv
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmarks'
NAMES = (
    'parameternet',
    'original_parameternet',
    'driver',
    'harness',
    'report',
)
QUICK = [
    '--device', 'cpu', '--size', 'tiny', '--batch-sizes', '2', '--repeats',
    '1', '--no-plots', '--no-memory',
]  # fmt: skip


@pytest.fixture
def tools(monkeypatch):
    """Import modules of the benchmarks by name, and forget them after."""
    hidden = {name: sys.modules.pop(name, None) for name in NAMES}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__
    for name, module in hidden.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_as_a_command(tools, tmp_path, capsys):
    options = [*QUICK, '--routing', 'softmax_mlp', '--out-dir', str(tmp_path)]
    assert tools('parameternet').main(options) == 0
    assert '600m, batch 2' in capsys.readouterr().out
    with (tmp_path / 'parameternet_cpu.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert {r['provider'] for r in rows} == {
        'original', 'reference', 'torch', 'plain'
    }  # fmt: skip
    assert {r['mode'] for r in rows} == {'forward', 'full'}
    assert json.loads(rows[0]['config'])['routing'] == 'softmax_mlp'


def test_no_timings_of_wrong_results(tools, monkeypatch, tmp_path, capsys):
    original = tools('original_parameternet')
    right = original.convolution
    monkeypatch.setattr(
        original, 'convolution', lambda *args: right(*args) * 1.01
    )
    options = [*QUICK, '--out-dir', str(tmp_path)]
    assert tools('parameternet').main(options) == 1
    assert 'no timings' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
