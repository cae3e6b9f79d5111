"""tools/benchmarks/onnx_latency.py, without the waiting."""

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
