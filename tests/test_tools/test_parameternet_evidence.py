"""The evidence of ParameterNet on a handful of made-up images."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'benchmarks'
NAMES = ['evidence', 'evidence_report', 'evidence_runs']


@pytest.fixture(scope='module')
def tools():
    """The tool and the module of its runs."""
    sys.path.insert(0, str(TOOLS))
    try:
        tool, _, runs = (
            importlib.import_module(f'parameternet_{name}') for name in NAMES
        )
        yield tool, runs
    finally:
        sys.path.remove(str(TOOLS))


def write_idx(path, array):
    dims = np.array(array.shape, '>i4').tobytes()
    head = bytes([0, 0, 8, array.ndim])
    path.write_bytes(head + dims + array.astype(np.uint8).tobytes())


@pytest.fixture
def folders(tmp_path):
    large, small = tmp_path / 'large', tmp_path / 'small'
    large.mkdir()
    (small / 'images').mkdir(parents=True)
    (small / 'annotations').mkdir()
    random = np.random.default_rng(0)
    for part, number in (('train', 20), ('t10k', 12)):
        images = random.integers(0, 256, (number, 28, 28))
        write_idx(large / f'{part}-images-idx3-ubyte', images)
        labels = np.arange(number) % 10
        write_idx(large / f'{part}-labels-idx1-ubyte', labels)
    for part, number in (('train', 8), ('test', 6)):
        lines = []
        for i in range(number):
            name = f'{part}{i}.png'
            pixels = random.integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(small / 'images' / name)
            lines.append(f'{name} {i % 2}\n')
        path = small / 'annotations' / f'defect_{part}.txt'
        path.write_text(''.join(lines))
    return large, small


def test_runs_go_on_and_are_reported(tools, folders, tmp_path, capsys):
    tool, _ = tools
    work_dir = tmp_path / 'runs'
    arguments = [
        '--large', str(folders[0]), '--small', str(folders[1]),
        '--work-dir', str(work_dir), '--seeds', '0', '1',
        '--large-images', '16', '--large-batch', '8', '--small-batch', '4',
        '--small-epochs', '1', '--size', '24',
        '--models', 'ghostnet', 'repconv', 'parameternet-2-sigmoid',
    ]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert tool.main(arguments) == 0
        first = work_dir / 'ghostnet_seed0.json'
        before = first.stat().st_mtime_ns
        (work_dir / 'repconv_seed1.json').unlink()
        assert tool.main(arguments) == 0
        assert first.stat().st_mtime_ns == before
        assert (work_dir / 'repconv_seed1.json').is_file()
        assert tool.main([*arguments, '--small-epochs', '2']) == 1
    finally:
        torch.set_num_threads(threads)
    report = work_dir / 'report'
    models = json.loads((report / 'results.json').read_text())['models']
    assert list(models) == ['GhostNet', 'RepConv', 'ParameterNet-2 sigmoid']
    ghost, rep, dynamic = models.values()
    # Merged, RepConv is GhostNet with biases.
    assert rep['multiply_adds'] == ghost['multiply_adds']
    assert ghost['parameters'] < rep['parameters'] < rep['trained']
    assert dynamic['parameters'] > rep['parameters']
    assert dynamic['experts']['top'] == pytest.approx(0.5, abs=0.1)
    values = ghost['values']
    assert values['gain'][0] == pytest.approx(
        values['pretrained'][0] - values['scratch'][0]
    )
    table = (report / 'table.md').read_text()
    assert '| GhostNet | 2 | 44 k |' in table
    assert len((report / 'results.csv').read_text().splitlines()) == 7
    assert (report / 'parameternet_evidence.png').stat().st_size > 1000


def test_missing_data(tools, tmp_path):
    arguments = ['--large', str(tmp_path), '--work-dir', str(tmp_path / 'w')]
    assert tools[0].main(arguments) == 1


def test_area_under_curve(tools):
    area = tools[1].area_under_curve
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9])
    assert area(scores, torch.tensor([0, 0, 1, 1])) == 0.875
    assert area(scores, torch.tensor([1, 1, 0, 0])) == 0.125


def test_runs_of_a_seed_are_alike(tools, folders):
    _, runs = tools
    data = runs.load_fashion_mnist(folders[0])
    recipe = runs.Recipe()
    config = runs.ConfigDict(
        importlib.import_module('mmengine.config')
        .Config.fromfile(
            TOOLS.parents[1] / 'configs/_base_/models' / 'parameternet_tiny.py'
        )
        .model
    )
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = runs.build(config, dict(num_experts=2), data.classes)
        loss = runs.train(model, data, 1, 8, recipe, 3)
        results.append((loss, runs.test(model, data.test)))
    assert results[0] == results[1]
