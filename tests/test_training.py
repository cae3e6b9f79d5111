"""Training as users start it: several processes, resuming, mixed precision.

Each test runs the real tools on a small data set, with a detector or with the
adapters of a classifier.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import test
import torch
import train as train_tool
from mmengine.registry import DefaultScope
from PIL import Image, ImageDraw

from lors_plugin.adapters import (
    fingerprint,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.ops import self_check

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / 'tests' / 'helpers'

CPU = dict(CUDA_VISIBLE_DEVICES='')
CONFIG = """
_base_ = '{base}'

data_root = '{data}/'
metainfo = dict(classes=('box', 'disc'))
model = dict(
    backbone=dict(depth=18, base_channels=8, frozen_stages=0, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    query_generator=dict(num_queries=12, embed_dims=32),
    decoder=dict(
        num_classes=2, num_stages=3, embed_dims=32, in_points=8,
        out_points=12, num_heads=4, feedforward_channels=64, {lors}))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob={flip}),
    dict(type='PackDetInputs'),
]
dataset = dict(
    data_root=data_root,
    metainfo=metainfo,
    ann_file='train.json',
    data_prefix=dict(img='images/'))
train_dataloader = dict(
    batch_size=4,
    num_workers={workers},
    persistent_workers={workers} > 0,
    sampler=dict(shuffle={shuffle}),
    batch_sampler=None,
    dataset=dict(
        filter_cfg=dict(_delete_=True, filter_empty_gt=False),
        pipeline=train_pipeline,
        **dataset))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64)),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'ori_shape', 'img_shape', 'scale_factor')),
]
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'train.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=2, val_interval=10)
optim_wrapper = dict(optimizer=dict({optimizer}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(save_last=True))
custom_hooks = [dict(type='NoticeHook'), dict(type='SaveRankHook')]
visualizer = dict(name='{name}')
custom_imports = dict(imports=['training_hooks'])
env_cfg = dict(mp_cfg=dict(mp_start_method='fork'))
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Eight pictures; the third, and with it one batch, has no boxes."""
    root = tmp_path_factory.mktemp('shapes')
    (root / 'images').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(8):
        picture = Image.new('RGB', (96, 64), tuple(rng.integers(0, 90, 3)))
        draw = ImageDraw.Draw(picture)
        for _ in range(0 if i in (1, 3) else 1 + i % 3):
            w, h = rng.integers(16, 40, 2).tolist()
            x, y = (rng.random(2) * (96 - w, 64 - h)).astype(int).tolist()
            kind = int(rng.integers(2))
            shape = draw.ellipse if kind else draw.rectangle
            colour = tuple(rng.integers(120, 255, 3).tolist())
            shape((x, y, x + w, y + h), fill=colour)
            annotations.append(
                dict(
                    id=len(annotations),
                    image_id=i,
                    category_id=kind,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                )
            )
        name = f'{i}.png'
        picture.save(root / 'images' / name)
        images.append(dict(id=i, file_name=name, width=96, height=64))
    categories = [dict(id=0, name='box'), dict(id=1, name='disc')]
    (root / 'train.json').write_text(
        json.dumps(
            dict(images=images, annotations=annotations, categories=categories)
        )
    )
    return root


def train(*words):
    """Train in this process."""
    train_tool.main([*map(str, words)])


@pytest.fixture(scope='module')
def launch(quick_python):
    """Train in a process of its own, or by ``dist_train.sh`` in several.

    ``launch(config, number, *words)`` returns what was printed.
    """

    def launch(config, number, *words, code=0, timeout=300, **env):
        paths = os.pathsep.join(map(str, [ROOT, HELPERS]))
        command = [quick_python, ROOT / 'tools' / 'train.py', config]
        if number:
            script = ROOT / 'tools' / 'dist_train.sh'
            command = ['bash', script, config, str(number)]
        result = subprocess.run(
            [*command, *map(str, words)],
            env=dict(os.environ, PYTHONPATH=paths, PYTHON=quick_python, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == code, result.stdout[-6000:]
        return result.stdout

    return launch


def write_config(
    path,
    data,
    kind='lors',
    flip=0.0,
    shuffle=False,
    workers=0,
    optimizer='lr=1e-3',
):
    """Write a config; give each run of a process a name of its own."""
    base = {
        'lors': 'lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
        'adamixer': 'adamixer/adamixer_r50_8xb2-1x_coco.py',
        'fsdp': 'strategies/lors-adamixer_r50_8xb2-1x-fsdp_coco.py',
        'deepspeed': 'strategies/lors-adamixer_r50_8xb2-1x-deepspeed_coco.py',
    }[kind]
    lors = '' if kind == 'adamixer' else 'adaptive_ranks=4, static_ranks=2'
    path.write_text(
        CONFIG.format(
            base=ROOT / 'configs' / base,
            data=data,
            name=path.stem,
            lors=lors,
            flip=flip,
            shuffle=shuffle,
            workers=workers,
            optimizer=optimizer,
        )
    )
    return path


def weights(work_dir, name='rank0.pth'):
    return torch.load(Path(work_dir) / name, weights_only=True)


def logged(work_dir, key='loss'):
    found = []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        lines = map(json.loads, path.read_text().splitlines())
        found += [line[key] for line in lines if key in line]
    return found


SGD = "_delete_=True, type='SGD', lr=0.01, momentum=0.9"
SEED = ['--cfg-options', 'randomness.seed=3']


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    """A training by plain SGD in one process."""
    work_dir = tmp_path_factory.mktemp('one')
    config = write_config(work_dir / 'alone.py', data, optimizer=SGD)
    train(config, '--work-dir', work_dir, *SEED)
    return work_dir


@pytest.mark.slow
def test_two_processes_do_what_one_does(data, alone, launch, tmp_path):
    """Same global batch: same losses, same weights, on both ranks.

    Both stop after the same step when a notice arrives, and go on from there.

    Image 1 and 3 have no boxes, so the first batch of rank 1 is empty. Plain
    SGD, since Adam turns the rounding of a zero gradient into a whole step.
    The two also recompute stages, which must not disturb shared weights.
    """
    config, two = alone / 'alone.py', tmp_path / 'two'
    options = ['train_dataloader.batch_size=2', 'model.decoder.with_cp=True']
    options = ['--work-dir', two, *SEED, *options]
    text = launch(config, 2, *options, code=75, **CPU)
    assert '2 CPU processes by gloo' in text
    assert 'saved interrupted.pth' in text
    text = launch(config, 2, '--resume', *options, **CPU)
    assert 'batches of this epoch were trained on before' in text
    assert not (two / 'interrupted.pth').exists()

    first, second = weights(two, 'rank0.pth'), weights(two, 'rank1.pth')
    assert_same_weights(first, weights(alone))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    for key in ('loss', 'stage2_loss_cls', 'stage0_loss_iou'):
        together = logged(two, key)
        assert len(together) == 4
        np.testing.assert_allclose(together, logged(alone, key), rtol=1e-4)


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, wanted[key], rtol=1e-3, atol=1e-5, msg=key
        )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['fsdp', 'deepspeed'])
def test_sharded_training(data, alone, launch, monkeypatch, tmp_path, kind):
    """The configs of FSDP and DeepSpeed train as one process does.

    Shared weights, and clipping by the norm over all shards.
    """
    if kind == 'deepspeed':
        pytest.importorskip('deepspeed', reason='needs DeepSpeed')
    config = write_config(tmp_path / f'{kind}.py', data, kind, optimizer=SGD)
    options = ['train_dataloader.batch_size=2', 'custom_hooks=[]']
    if kind == 'deepspeed':  # which does not know plain SGD
        options += ['strategy.config.zero_allow_untested_optimizer=True']
    options = ['--work-dir', tmp_path, *SEED, *options]
    launch(config, 2, *options, **CPU)
    for key, tolerance in dict(loss=1e-4, grad_norm=1e-3).items():
        if key == 'loss' or kind == 'fsdp':
            np.testing.assert_allclose(
                logged(tmp_path, key), logged(alone, key), rtol=tolerance
            )
    file = tmp_path / 'epoch_2.pth'
    if kind == 'deepspeed':
        monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
        state = read(file / 'mp_rank_00_model_states.pt')['module']
    else:
        state = read(file)['state_dict']
    assert_same_weights(state, weights(alone))


@pytest.mark.slow
def test_resuming_changes_nothing(data, launch, tmp_path):
    """Two epochs, or one and one more: equal to the last bit.

    With shuffling, flips, workers that persist, and no seed in the config;
    the second epoch runs in a process of its own.
    """
    config = write_config(
        tmp_path / 'resumed.py', data, flip=0.5, shuffle=True, workers=1
    )
    train(config, '--work-dir', tmp_path / 'whole')
    first = tmp_path / 'whole' / 'epoch_1.pth'
    parts = tmp_path / 'parts'
    launch(config, 0, '--work-dir', parts, '--resume', first, **CPU)
    whole, resumed = weights(tmp_path / 'whole'), weights(parts)
    start = torch.load(first, weights_only=False)['state_dict']
    assert any(not torch.equal(start[k], whole[k]) for k in whole)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_mixed_precision_learns(data, tmp_path):
    """Losses stay finite and near those of float32."""
    losses = {}
    for dtype in ('float32', 'bfloat16', 'float16'):
        config = write_config(tmp_path / f'{dtype}.py', data, 'adamixer')
        out = tmp_path / dtype
        amp = [] if dtype == 'float32' else ['--amp', dtype]
        seed = ['--cfg-options', 'randomness.seed=3']
        train(config, '--work-dir', out, *amp, *seed)
        losses[dtype] = logged(out)
        assert all(v.isfinite().all() for v in weights(out).values())
    full = losses.pop('float32')
    for half in losses.values():
        assert len(half) == 4
        # A step of float16 may be skipped while its loss scale is found.
        np.testing.assert_allclose(half[0], full[0], rtol=2e-2)
        np.testing.assert_allclose(half, full, rtol=0.15)


@pytest.mark.slow
def test_what_is_not_finite_stops_with_its_name(data, tmp_path):
    """A learning rate far too high: an error, not a crash in the matcher."""
    config = write_config(tmp_path / 'too_high.py', data)
    options = ['optim_wrapper.optimizer.lr=1e12']
    options += ['optim_wrapper.clip_grad=None']
    with pytest.raises(FloatingPointError, match='stage.*images/'):
        train(config, '--work-dir', tmp_path, '--cfg-options', *options)


@pytest.mark.slow
def test_accumulated_steps_and_averaged_weights(data, tmp_path):
    """Four iterations make two steps; the file holds both weights."""
    config = write_config(tmp_path / 'averaged.py', data)
    text = config.read_text().replace(
        'custom_hooks = [', "custom_hooks = [dict(type='EMAHook'),"
    )
    config.write_text(text)
    options = ['--cfg-options', 'optim_wrapper.accumulative_counts=2']
    train(config, '--work-dir', tmp_path, *options)
    assert len(logged(tmp_path)) == 4
    content = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    steps = {int(s['step']) for s in content['optimizer']['state'].values()}
    assert steps == {2}
    averaged, plain = content['state_dict'], content['ema_state_dict']
    trained = [name for name in averaged if name.startswith('decoder.')]
    assert trained and all(
        not torch.equal(averaged[name], plain[f'module.{name}'])
        for name in trained
    )


CLASSIFIER = dict(
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
ADAPTER_CONFIG = """
default_scope = 'mmpretrain'
model = {model!r}
model['backbone']['init_cfg'] = dict(
    type='Pretrained', checkpoint='{data}/base.pth')
data_preprocessor = dict(mean=[128] * 3, std=[64] * 3, num_classes=2)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='{data}/images',
                 pipeline=pipeline))
test_dataloader = dict(
    train_dataloader, sampler=dict(type='DefaultSampler', shuffle=False))
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

TWO_RANKS = """
_base_ = 'config.py'
train_dataloader = dict(batch_size=2)
custom_hooks = _base_.custom_hooks + [dict(type='SaveRankHook')]
custom_imports = dict(imports=['training_hooks'])
"""


def build_classifier():
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(CLASSIFIER))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Eight pictures of two classes, the weights of a base, a config."""
    root = tmp_path_factory.mktemp('adapters')
    rng = np.random.default_rng(0)
    for i in range(8):
        path = root / 'images' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype('uint8')).save(path)
    torch.manual_seed(5)
    torch.save(build_classifier().backbone.state_dict(), root / 'base.pth')
    (root / 'config.py').write_text(
        ADAPTER_CONFIG.format(data=root, model=CLASSIFIER)
    )
    (root / 'two.py').write_text(TWO_RANKS)
    return root


def read(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def trained(pictures):
    """Two epochs in one process."""
    work_dir = pictures / 'one'
    train(pictures / 'config.py', '--work-dir', work_dir)
    return work_dir


DESCRIBED = """
_base_ = 'config.py'
train_dataloader = dict(batch_size={batch})
model = dict(
    backbone={{'_delete_': True, 'type': 'lors_plugin.AdaptedModel',
               'dropout': 0.0, 'trainable': ['ln1'],
               'module': _base_.model.backbone}})
custom_hooks = []
"""
SHARDED = """
runner_type = 'FlexibleRunner'
strategy = dict(type='FSDPStrategy', state_dict_cfg='full')
"""


@pytest.mark.slow
def test_sharded_adapters(pictures, launch):
    """FSDP trains adapters in a frozen backbone as one process does."""
    states = []
    for batch, more in (4, ''), (2, SHARDED):
        config = pictures / f'batch_of_{batch}.py'
        config.write_text(DESCRIBED.format(batch=batch) + more)
        work_dir = pictures / config.stem
        if more:
            launch(config, 2, '--work-dir', work_dir, **CPU)
        else:
            train(config, '--work-dir', work_dir)
        states.append(read(work_dir / 'epoch_2.pth')['state_dict'])
    wanted, found = states
    assert_same_weights(found, wanted)
    base = read(pictures / 'base.pth')
    for key, value in base.items():
        kept = torch.equal(found[f'backbone.{key}'], value)
        assert kept != key.startswith('ln1'), key


@pytest.mark.slow
def test_adapters_in_two_processes(pictures, trained, launch):
    """Same global batch: same adapters, on both ranks, and small files."""
    two = pictures / 'two'
    launch(pictures / 'two.py', 2, '--work-dir', two, **CPU)
    first, second = read(two / 'rank0.pth'), read(two / 'rank1.pth')
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    file, alone = (read(path / 'epoch_2.pth') for path in (two, trained))
    meta = file['meta'][META]
    assert meta == alone['meta'][META]
    start = build_classifier()
    start.backbone.load_state_dict(read(pictures / 'base.pth'))
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
def test_adapters_are_resumed_and_tested(pictures, trained):
    """By the tools, in bfloat16 from the second epoch on."""
    config = str(pictures / 'config.py')
    path = pictures / 'half' / 'epoch_2.pth'
    options = ['--resume', trained / 'epoch_1.pth', '--amp', 'bfloat16']
    train(config, '--work-dir', pictures / 'half', *options)
    file, whole = read(path), read(trained / 'epoch_2.pth')
    assert is_adapter_checkpoint(file)
    for key, value in file['state_dict'].items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(
            value, whole['state_dict'][key], rtol=0.05, atol=0.02
        )
    test.main([config, str(path), '--work-dir', str(pictures / 'test')])
    (report,) = (pictures / 'test').glob('*/*.json')
    model = build_classifier()
    model.backbone.load_state_dict(read(pictures / 'base.pth'))
    load_adapter_checkpoint(model, path)
    measured = json.loads(report.read_text())['accuracy/top1']
    assert measured == accuracy(model, pictures)


def accuracy(model, pictures):
    model.eval()
    right = 0
    for i in range(8):
        path = pictures / 'images' / 'ab'[i % 2] / f'{i}.png'
        pixels = np.array(Image.open(path))[..., ::-1].copy()
        image = (torch.from_numpy(pixels).float() - 128) / 64
        with torch.no_grad():
            scores = model(image.permute(2, 0, 1)[None], mode='tensor')
        right += int(scores.argmax() == i % 2)
    return 100 * right / 8


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU that PyTorch can use'
)
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('gpus', [1, 2])
def test_training_on_gpus(data, launch, tmp_path, gpus, amp):
    """By ``dist_train.sh``, with the check of the kernels before."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f'needs {gpus} GPUs')
    config = write_config(tmp_path / f'gpus{gpus}{amp}.py', data)
    words = ['--work-dir', tmp_path, *(['--amp'] if amp else [])]
    # No notice to stop by the hook of the tests above.
    words += ['--cfg-options', 'custom_hooks=[]', 'custom_imports=None']
    # A card that is not known yet is checked before.
    limit = 300 + self_check.Limits().total
    text = launch(config, gpus, *words, timeout=limit)
    assert 'Triton kernels run for' in text or 'PyTorch operators' in text
    losses = logged(tmp_path)
    assert len(losses) == 2 * -(-2 // gpus) and np.isfinite(losses).all()
