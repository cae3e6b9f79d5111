"""Adapters through the real tools: two processes, mixed precision, testing."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test
import torch
import train
from mmengine.registry import DefaultScope
from PIL import Image

from lors_plugin.adapters import (
    fingerprint,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
)
from lors_plugin.adapters.checkpoint import META

ROOT = Path(__file__).resolve().parents[2]

MODEL = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48
        ),
        img_size=16,
        patch_size=8,
    ),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=24),
)
CONFIG = """
default_scope = 'mmpretrain'
model = {model!r}
model['backbone']['init_cfg'] = dict(
    type='Pretrained', checkpoint='{data}/base.pth')
data_preprocessor = dict(mean=[128] * 3, std=[64] * 3, num_classes=2)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='{data}/images',
                 pipeline=pipeline))
test_dataloader = train_dataloader
test_evaluator = dict(type='Accuracy')
train_cfg = dict(by_epoch=True, max_epochs=2)
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
custom_hooks = [
    dict(type='lors_plugin.RepAdapterHook', adapter_only=True, dropout=0.0,
         trainable=['ln1']),
    dict(type='EMAHook', momentum=0.25)]
env_cfg = dict(mp_cfg=dict(mp_start_method='fork'))
randomness = dict(seed=0)
"""

TWO = """
_base_ = 'config.py'
train_dataloader = dict(batch_size=2)
custom_hooks = _base_.custom_hooks + [dict(type='SaveRankHook')]
custom_imports = dict(imports=['save_rank_hook'])
"""
HOOK = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveRankHook(Hook):
    def after_train(self, runner):
        model = runner.model
        if is_model_wrapper(model):
            assert not model.find_unused_parameters
            model = model.module
        torch.save(model.state_dict(),
                   f'{runner.work_dir}/rank{get_rank()}.pth')
"""


def build_model():
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(MODEL))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Eight pictures of two classes, the weights of a base, a config."""
    root = tmp_path_factory.mktemp('adapters')
    rng = np.random.default_rng(0)
    for i in range(8):
        path = root / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype('uint8')).save(path)
    torch.manual_seed(5)
    torch.save(build_model().backbone.state_dict(), root / 'base.pth')
    (root / 'save_rank_hook.py').write_text(HOOK)
    (root / 'config.py').write_text(CONFIG.format(data=root, model=MODEL))
    (root / 'two.py').write_text(TWO)
    return root


# The hosts are imported once for both ranks; tests/test_training.py starts the
# real launcher.
TWO_RANKS = """
import multiprocessing, os, sys
import mmpretrain.models, train

def run(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    train.main([*sys.argv[1:], '--launcher', 'pytorch'])

context = multiprocessing.get_context('fork')
ranks = [context.Process(target=run, args=(i,)) for i in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
sys.exit(any(rank.exitcode for rank in ranks))
"""


def train_two(data, *words):
    """Train in two processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    paths = [ROOT, ROOT / 'tools', data]
    env = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(map(str, paths)),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='',
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    result = subprocess.run(
        [sys.executable, '-c', TWO_RANKS, *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]


def read(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(autouse=True, scope='module')
def scope():
    """Runners leave their default scope behind, which others would find."""
    known = DefaultScope._instance_dict
    before = dict(known)
    yield
    known.clear()
    known.update(before)


@pytest.fixture(scope='module')
def trained(data):
    """Two epochs in one process."""
    work_dir = data / 'one'
    train.main([str(data / 'config.py'), '--work-dir', str(work_dir)])
    return work_dir


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, trained):
    """Same global batch: same adapters, on both ranks, and small files."""
    two = data / 'two'
    train_two(data, data / 'two.py', '--work-dir', two)
    first, second = read(two / 'rank0.pth'), read(two / 'rank1.pth')
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    file, alone = (read(path / 'epoch_2.pth') for path in (two, trained))
    meta = file['meta'][META]
    assert meta == alone['meta'][META]
    start = build_model()
    start.backbone.load_state_dict(read(data / 'base.pth'))
    assert meta['fingerprint'] == fingerprint(start, meta['keys'])
    for part in ('state_dict', 'ema_state_dict'):
        assert file[part].keys() == alone[part].keys()
        for key, value in file[part].items():
            torch.testing.assert_close(
                value, alone[part][key], rtol=1e-3, atol=1e-5
            )
    for key in meta['keys']:
        assert torch.equal(file['ema_state_dict'][f'module.{key}'], first[key])
        before = start.state_dict().get(key, torch.zeros_like(first[key]))
        assert key.endswith('scale') or not torch.equal(first[key], before)


@pytest.mark.slow
def test_a_file_is_resumed_and_tested(data, trained):
    """By the tools, in bfloat16 from the second epoch on."""
    config, path = str(data / 'config.py'), data / 'half' / 'epoch_2.pth'
    options = ['--resume', str(trained / 'epoch_1.pth'), '--amp', 'bfloat16']
    train.main([config, '--work-dir', str(data / 'half'), *options])
    file, whole = read(path), read(trained / 'epoch_2.pth')
    assert is_adapter_checkpoint(file)
    for key, value in file['state_dict'].items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(
            value, whole['state_dict'][key], rtol=0.05, atol=0.02
        )
    test.main([config, str(path), '--work-dir', str(data / 'test')])
    (report,) = (data / 'test').glob('*/*.json')
    model = build_model()
    model.backbone.load_state_dict(read(data / 'base.pth'))
    load_adapter_checkpoint(model, path)
    measured = json.loads(report.read_text())['accuracy/top1']
    assert measured == accuracy(model, data)


def accuracy(model, data):
    model.eval()
    right = 0
    for i in range(8):
        path = data / 'images' / 'ab'[i % 2] / f'{i}.png'
        pixels = np.array(Image.open(path))[..., ::-1].copy()
        image = (torch.from_numpy(pixels).float() - 128) / 64
        with torch.no_grad():
            scores = model(image.permute(2, 0, 1)[None], mode='tensor')
        right += int(scores.argmax() == i % 2)
    return 100 * right / 8
