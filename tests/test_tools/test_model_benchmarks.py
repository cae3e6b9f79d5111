"""tools/benchmarks/llama_moe.py, without the waiting."""

import csv

import pytest


def test_language_models_count_as_published(root, monkeypatch, capsys):
    pytest.importorskip('transformers')
    monkeypatch.syspath_prepend(str(root / 'tools' / 'benchmarks'))
    import llama_moe

    assert llama_moe.main(['count']) == 0
    assert '1,540,507,648' in capsys.readouterr().out
    monkeypatch.setitem(llama_moe.PUBLISHED, 4, 1.55)
    assert llama_moe.main(['count']) == 1


def test_language_models_train(root, monkeypatch, tmp_path):
    pytest.importorskip('transformers')
    monkeypatch.syspath_prepend(str(root / 'tools' / 'benchmarks'))
    import llama_moe

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    monkeypatch.setattr(llama_moe, 'SMALL', {**llama_moe.SMALL, **small})
    command = ['train', '--steps', '2', '--batch', '2', '--seeds', '3']
    command += ['--models', 'dense', 'up-4', '--out-dir', str(tmp_path)]
    assert llama_moe.main(command) == 0
    with open(tmp_path / 'llama_moe.csv') as file:
        dense, mixture = csv.DictReader(file)
    assert int(mixture['parameters']) - int(dense['parameters']) == 3 * 64 + 32
    assert float(mixture['balance']) >= 0.99
