"""tools/benchmarks/onnx_latency.py and llama_moe.py, without the waiting."""

import csv

import pytest


@pytest.fixture
def latency(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools' / 'benchmarks'))
    import onnx_latency

    class Session:
        def run(self, outputs, feed):
            assert feed['images'].shape == (1, 3, 64, 64)

    monkeypatch.setattr(
        onnx_latency, 'prepare', lambda name, args: (Session(), 1_500_000)
    )
    return onnx_latency


def test_latency_is_written_between_the_marks(latency, tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text(f'a\n{latency.BEGIN}\nold\n{latency.END}\nb\n')
    command = ['--rounds', '3', '--shape', '64', '--out-dir', str(tmp_path)]
    assert latency.main([*command, '--page', str(page)]) == 0
    text = page.read_text()
    assert text.startswith('a\n') and text.endswith('\nb\n')
    assert '| ResNet-50 | 1.50 M |' in text and 'old' not in text
    with open(tmp_path / 'onnx_latency.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows] == list(latency.MODELS)
    page.write_text('no marks')
    assert latency.main([*command, '--page', str(page)]) == 2
    assert 'no marks' in capsys.readouterr().err


def test_latency_of_threads_needs_the_wall_clock(latency):
    with pytest.raises(SystemExit):
        latency.parse_args(['--threads', '2', '--clock', 'cpu'])


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
