"""The benchmark of adapters, with a tiny model on a few grey pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from PIL import Image

ROOT = Path(__file__).parents[2]
WAYS = ['linear-probe', 'repadapter-block-scale-1']


@pytest.fixture
def tool(monkeypatch):
    for folder in ('benchmarks', 'analysis_tools'):
        monkeypatch.syspath_prepend(str(ROOT / 'tools' / folder))
    import rep_adapter

    logger, threads = MMLogger.get_current_instance(), torch.get_num_threads()
    level, flash = logger.level, torch.backends.cuda.flash_sdp_enabled()
    yield rep_adapter
    logger.setLevel(level)
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(flash)


@pytest.fixture
def options(tmp_path):
    """Options of the command line that make all small."""
    root = tmp_path / 'data'
    (root / 'images').mkdir(parents=True)
    (root / 'annotations').mkdir()
    for split in ('train', 'val', 'test'):
        lines = []
        for i in range(4):
            pixels = np.full((30, 30), 60 * i, np.uint8)
            Image.fromarray(pixels).save(root / f'images/{split}{i}.png')
            lines.append(f'{split}{i}.png {i % 2}\n')
        path = root / f'annotations/defect_{split}.txt'
        path.write_text(''.join(lines))
    return [
        '--cfg-options',
        'model.backbone.arch=deit-tiny',
        'model.backbone.init_cfg=None',
        'model.head.in_channels=192',
        'train_dataloader.batch_size=4',
        'train_cfg.max_iters=2',
        'param_scheduler.1.begin=1',
        'train_cfg.val_interval=1',
        *(f'{s}_dataloader.dataset.data_root={root}'
          for s in ('train', 'val', 'test')),
    ]  # fmt: skip


def test_train_and_report(tool, options, tmp_path, caplog):
    work_dir = ['--work-dir', str(tmp_path / 'runs')]
    command = ['train', *work_dir, '--seeds', '0', '1', '--arms', *WAYS]
    assert tool.main([*command, *options]) == 0
    files = sorted((tmp_path / 'runs').glob('*/result.json'))
    assert len(files) == 4
    times = [path.stat().st_mtime_ns for path in files]
    run = json.loads((files[-1]).read_text())
    assert run['seed'] == 1 and run['arm'] == 'RepAdapter block, scale 1'
    # 24 adapters of 192 channels and a classifier
    adapter = 8 * 192 + 8 + 192 * 4 + 192
    assert run['trained'] == 24 * adapter + 2 * 193
    assert run['val'] == max(run['val_curve'])

    assert tool.main([*command, *options]) == 0
    assert [path.stat().st_mtime_ns for path in files] == times
    assert tool.main([*command, *options, 'train_cfg.max_iters=1']) == 1
    assert 'other options' in caplog.text

    assert tool.main(['report', *work_dir]) == 0
    out = tmp_path / 'runs' / 'report'
    rows = (out / 'solar_cells.csv').read_text().splitlines()
    assert len(rows) == 5
    assert '| RepAdapter block, scale 1 |' in (out / 'tables.md').read_text()
    with Image.open(out / 'solar_cells.png') as image:
        assert min(image.size) > 300


def test_search_never_tests(tool, options, tmp_path, monkeypatch):
    from mmengine.runner import Runner

    monkeypatch.setattr(Runner, 'test', None)
    command = ['search', '--work-dir', str(tmp_path), '--scales', '0.1', '5']
    assert tool.main([*command, *options]) == 0
    files = sorted(tmp_path.glob('search_*/*/result.json'))
    scales = [json.loads(path.read_text())['arm'] for path in files]
    assert scales == ['scale 0.1', 'scale 5']
    config = str(ROOT / 'configs/rep_adapter/vit-small-p14_full_elpv-70px.py')
    assert tool.main([*command, '--config', config]) == 1


def test_latency(tool, options, tmp_path):
    command = ['latency', '--work-dir', str(tmp_path), '--rounds', '2']
    command += ['--size', '70', '--batches', '1', '2']
    assert tool.main([*command, *options]) == 0
    result = json.loads((tmp_path / 'latency.json').read_text())
    assert set(result['seconds']) == {'plain', 'adapted', 'merged'}
    assert set(result['seconds']['merged']) == {'1', '2'}
    assert result['difference'] < 1e-5 < 1e-2 < result['moved']
    assert tool.main(['report', '--work-dir', str(tmp_path)]) == 0
    assert '| merged |' in (tmp_path / 'report/tables.md').read_text()


def test_nothing_to_report(tool, tmp_path, caplog):
    assert tool.main(['report', '--work-dir', str(tmp_path / 'new')]) == 1
    assert 'nothing was run' in caplog.text


def test_missing_data(tool, tmp_path, caplog):
    command = ['train', '--work-dir', str(tmp_path), '--arms', WAYS[0]]
    roots = [
        f'{s}_dataloader.dataset.data_root={tmp_path}/no'
        for s in ('train', 'val', 'test')
    ]
    assert tool.main([*command, '--cfg-options', *roots]) == 1
    assert 'docs/en/benchmarks/rep_adapter.md' in caplog.text
