"""The benchmark on BCCD, on four small pictures of the same layout."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'en' / 'benchmarks' / 'bccd.md'
RESULTS = PAGE.with_suffix('')
TOOL = ROOT / 'tools' / 'benchmarks' / 'bccd.py'
CLASSES = ('RBC', 'WBC', 'Platelets')
SMALL = [
    'model.backbone.init_cfg=None',
    'model.decoder.num_stages=2',
    'model.decoder.in_points=4',
    'model.decoder.out_points=8',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'train_dataloader.dataset.pipeline.2.scale=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(64,64)',
    'default_hooks.logger.interval=1',
]


@pytest.fixture
def tool(monkeypatch):
    for folder in ('benchmarks', 'analysis_tools'):
        monkeypatch.syspath_prepend(str(ROOT / 'tools' / folder))
    import bccd

    logger, threads = MMLogger.get_current_instance(), torch.get_num_threads()
    level = logger.level
    yield bccd
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def report(tool):
    import bccd_report

    return bccd_report


@pytest.fixture
def data(tmp_path):
    """Four images with two boxes each, two to train on and two to test."""
    root = tmp_path / 'data'
    (root / 'images').mkdir(parents=True)
    (root / 'annotations').mkdir()
    for split, ids in (('train', (1, 2)), ('val', (3, 4))):
        images, annotations = [], []
        for i in ids:
            pixels = np.full((48, 64, 3), 60 * i, np.uint8)
            Image.fromarray(pixels).save(root / 'images' / f'{i}.jpg')
            images.append(
                dict(id=i, file_name=f'{i}.jpg', width=64, height=48)
            )
            for j, box in enumerate(([4, 4, 20, 20], [30, 10, 24, 30])):
                annotations.append(
                    dict(
                        id=2 * i + j, image_id=i, category_id=j + 1,
                        bbox=box, area=box[2] * box[3], iscrowd=0,
                    )
                )  # fmt: skip
        categories = [
            dict(id=n, name=name) for n, name in enumerate(CLASSES, 1)
        ]
        content = dict(
            images=images, annotations=annotations, categories=categories
        )
        path = root / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(content))
    return root


def options(data, work_dir, *more):
    return [
        '--data-root', str(data), '--work-dir', str(work_dir),
        '--seeds', '0', '--max-epochs', '1', '--jobs', '2',
        '--rounds', '2', *more,
    ]  # fmt: skip


def test_command(tool, data, tmp_path, caplog):
    """Two models, from the command to table and plots; then again."""
    work_dir = tmp_path / 'work'
    models = ['adamixer-g2-p32', 'lors-g2-p32']
    arguments = options(data, work_dir, '--models', *models)
    arguments += ['--cfg-options', *SMALL]
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'},
    )
    assert done.returncode == 0, done.stderr
    out = work_dir / 'report'
    results = json.loads((out / 'results.json').read_text())
    baseline, lors = results['models'].values()
    assert lors['decoder_params'] < baseline['decoder_params']
    assert lors['memory']['state'] < baseline['memory']['state']
    for model in (baseline, lors):
        assert 0 < model['mixing_params'] < model['decoder_params']
        assert model['decoder_params'] < model['params']
        assert model['train_seconds']['median'] > 0
        assert model['memory']['saved'] > 0
        assert model['peak_memory'] > 1e8
        assert [run['seed'] for run in model['runs']] == [0]
        assert [p['step'] for p in model['runs'][0]['curve']] == [1]
        assert 0 <= model['AP']['mean'] <= 100
    assert set(results['against_baseline']) == {'LORS G2 P32'}
    assert results['threads'] == 1
    assert (out / 'table.md').read_text().count('\n') == 9
    assert len((out / 'results.csv').read_text().splitlines()) == 3
    for name in ('bccd_ap.png', 'bccd_curves.png'):
        with Image.open(out / name) as picture:
            assert picture.width > 800
    # Again: nothing is trained, by another recipe it is refused.
    logs = {path: path.stat().st_mtime_ns for path in work_dir.glob('*/*log')}
    assert len(logs) == 2
    assert tool.main([*arguments, '--rounds', '0']) == 0
    assert logs == {path: path.stat().st_mtime_ns for path in logs}
    assert tool.main([*arguments, '--max-epochs', '2']) == 1
    assert 'another recipe' in caplog.text


def test_failure_names_the_log(tool, data, tmp_path, caplog):
    (data / 'annotations' / 'instances_val.json').unlink()
    work_dir = tmp_path / 'work'
    arguments = options(data, work_dir, '--models', 'lors-g2-p32')
    assert tool.main(arguments) == 1
    log = work_dir / 'lors-g2-p32_seed0' / 'train.log'
    assert str(log) in caplog.text.split('error: ')[-1]
    assert 'instances_val.json' in log.read_text()
    assert not (work_dir / 'report').exists()


def test_no_data(tool, tmp_path, caplog):
    assert tool.main(options(tmp_path / 'nowhere', tmp_path / 'work')) == 1
    assert 'docs/en/benchmarks/bccd.md says how' in caplog.text


def test_backbone_is_that_of_the_quick_start(tool):
    import bccd_runs as runs

    script = (ROOT / 'tools' / 'quickstart.sh').read_text()
    for text in (
        f'trunk={runs.TRUNK}\n',
        runs.TRUNK_WHEEL,
        runs.TRUNK_SHA256,
        f'file={runs.TRUNK_FILE}\n',
    ):
        assert text in script
    for config in tool.MODELS.values():
        cfg = runs.Recipe().load(ROOT / config)
        assert cfg.model.backbone.init_cfg.checkpoint == runs.TRUNK


def test_comparison(report):
    def runs(*values):
        return [dict(AP=value) for value in values]

    near = report.compare(runs(30.0, 31.0, 32.0), runs(31.0, 32.0, 33.0))
    assert near == dict(difference=-1.0, spread=0.82, within=True)
    far = report.compare(runs(20.0, 21.0, 22.0), runs(31.0, 32.0, 33.0))
    assert far['difference'] == -11 and not far['within']
    assert report.compare(runs(20.0), runs(31.0))['within'] is None
    assert report.summarise([1.0, 3.0]) == dict(mean=2.0, std=1.41)
    assert report.summarise([1.0]) == dict(mean=1.0, std=0.0)


def write_voc(root):
    """The layout of the public data set, two images a split."""
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    for number, split in enumerate(('train', 'train', 'val', 'val', 'test')):
        name = f'BloodImage_{number:05d}'
        pixels = np.zeros((480, 640, 3), np.uint8)
        Image.fromarray(pixels).save(root / 'JPEGImages' / f'{name}.jpg')
        objects = ''.join(
            f'<object><name>{label}</name><difficult>0</difficult><bndbox>'
            '<xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax>'
            '</bndbox></object>'
            for label in CLASSES[number % 2 :]
        )
        (root / 'Annotations' / f'{name}.xml').write_text(
            f'<annotation><filename>{name}.jpg</filename><size><width>640'
            '</width><height>480</height><depth>3</depth></size>'
            f'{objects}</annotation>'
        )
        with (root / 'ImageSets' / 'Main' / f'{split}.txt').open('a') as file:
            file.write(name + '\n')


def test_documented_conversion(tmp_path):
    """The commands of the page, run on a tree of the public layout."""
    block = re.search(r'```bash\n(git clone.*?)```', PAGE.read_text(), re.S)
    clone, *commands = block.group(1).replace('\\\n', ' ').strip().splitlines()
    write_voc(tmp_path / clone.split('/')[-1] / 'BCCD')
    for command in commands:
        words = shlex.split(command)
        if words[0] == 'python':
            words[:2] = [sys.executable, str(ROOT / words[1])]
        subprocess.run(words, check=True, cwd=tmp_path)
    folder = tmp_path / 'data' / 'bccd'
    for split in ('train', 'val'):
        path = folder / 'annotations' / f'instances_{split}.json'
        coco = json.loads(path.read_text())
        assert [c['name'] for c in coco['categories']] == list(CLASSES)
        assert len(coco['images']) == 2 and len(coco['annotations']) == 5
        assert coco['annotations'][0]['bbox'] == [10, 20, 40, 40]
        for image in coco['images']:
            assert (folder / 'images' / image['file_name']).is_file()


def test_page_shows_the_results(report, tool):
    """The tables of the page are those that the numbers give."""
    results = json.loads((RESULTS / 'results.json').read_text())
    assert list(results['models']) == list(tool.MODELS)
    page = PAGE.read_text()
    assert report.make_table(results['models'], tool.BASELINE) in page
    assert report.make_cost_table(results['models'], tool.BASELINE) in page
    for name, model in results['models'].items():
        assert (ROOT / model['config']).is_file(), name
        assert len(model['runs']) >= 3, name
        values = [run['AP'] for run in model['runs']]
        assert model['AP'] == report.summarise(values)
