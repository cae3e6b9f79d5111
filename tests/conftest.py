"""What several test files share: a detector small enough for any test."""

import gc
import json
import logging
import os
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import base_dataset
from mmengine.fileio.handlers.registry_utils import file_handlers
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from quick_python import start
from torch.utils.data import _utils
from yapf.yapflib import yapf_api

ROOT = Path(__file__).parents[1]
CONFIGS, FULL_SIZE = {}, {}


def pytest_configure():
    """Take one thread per process where nothing else is asked for.

    Tensors are small here, and a forked child has one thread anyway.
    """
    threads = os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(int(threads))


def pytest_collection_modifyitems(items):
    """Take files with slow tests first, so that processes end together."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


def merge(config, changes):
    """``config`` with entries of ``changes`` replaced, nested ones too."""
    config = dict(config)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = merge(config[key], value) if both else value
    return config


@pytest.fixture(autouse=True, scope='session')
def compiled_here(tmp_path_factory):
    """What was compiled before may call operators as they were then."""
    # Importing PyTorch's compiler sets the variable too.
    cache = str(tmp_path_factory.mktemp('compiled'))
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache


@pytest.fixture(autouse=True, scope='session')
def quick_hosts():
    """Without what takes MMEngine longer than a small training."""
    with pytest.MonkeyPatch.context() as patch:
        # The layout of configs that a run logs and writes, five times.
        patch.setattr(yapf_api, 'FormatCode', lambda text, **_: (text, True))
        # Workers of a loader that nothing asks for data look so often for
        # the end of their parent, which waits as long for them.
        for module in (_utils, _utils.worker):
            patch.setattr(module, 'MP_STATUS_CHECK_INTERVAL', 0.1)
        # Data sets collect garbage, among a million objects.
        patch.setattr(base_dataset, 'gc', SimpleNamespace(collect=int))
        yield


@pytest.fixture(scope='session')
def quick_python():
    """An interpreter like ``sys.executable`` that has imported the hosts."""
    # All workers of xdist share it.
    run = os.environ.get('PYTEST_XDIST_TESTRUNUID')
    if run is None:
        return start(str(os.getpid()), os.getpid())
    return start(run[:8], os.getppid())


@pytest.fixture(autouse=True, scope='session')
def restore_process(compiled_here):
    """Undo what tools do to a process, which ends after one of them: the
    readers that they set, environment variables such as the rank."""
    environment = dict(os.environ)
    reader = vars(CheckpointLoader)['load_checkpoint']
    handlers = dict(file_handlers)

    def restore():
        CheckpointLoader.load_checkpoint = reader
        file_handlers.update(handlers)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)

    return restore


@pytest.fixture(autouse=True, scope='module')
def nothing_left_behind(restore_process):
    """Scopes and loggers of runners, what :func:`restore_process` names and
    the silence that tools ask for."""
    # A fixture of the session may have run a tool just before.
    restore_process()
    # Later collections pass over what is there now: a million objects.
    gc.collect()
    gc.freeze()
    # A logger writes where standard error went when it was made.
    MMLogger._instance_dict.clear()
    known = (DefaultScope, MMLogger, MessageHub)
    before = [dict(kind._instance_dict) for kind in known]
    yield
    restore_process()
    for kind, former in zip(known, before):
        # Another dict by now, where a scope was overwritten.
        kind._instance_dict.clear()
        kind._instance_dict.update(former)
    logging.disable(logging.NOTSET)


TINY = dict(
    type='lors_plugin.AdaMixer',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        frozen_stages=1,
        norm_eval=True,
    ),
    neck=dict(
        type='lors_plugin.SharedNormChannelMapping',
        in_channels=[8, 16, 32, 64],
        out_channels=32,
        num_norm_groups=8,
    ),
    query_generator=dict(
        type='lors_plugin.InitialQueryGenerator', num_queries=7, embed_dims=32
    ),
    decoder=dict(
        num_classes=3,
        num_stages=3,
        embed_dims=32,
        num_groups=2,
        in_points=4,
        out_points=6,
        num_heads=4,
        feedforward_channels=48,
    ),
)
DECODERS = dict(
    adamixer=dict(type='lors_plugin.AdaMixerDecoder'),
    lors=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        adaptive_ranks=3,
        adaptive_groups=[1, 2, 3],
        static_ranks=2,
    ),
)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope='session')
def tiny_config():
    """Config of a tiny detector: ``tiny_config('lors', decoder={...})``."""

    def make(kind='lors', **changes):
        config = merge(deepcopy(TINY), dict(decoder=DECODERS[kind]))
        return merge(config, changes)

    return make


@pytest.fixture(scope='session')
def build():
    """Build a model config as MMDetection's tools do."""
    from mmengine.registry import DefaultScope

    from lors_plugin.registry import MODELS

    def make(config):
        with DefaultScope.overwrite_default_scope('mmdet'):
            return MODELS.build(deepcopy(config))

    return make


@pytest.fixture(scope='session')
def tiny_detector(build, tiny_config):
    """A tiny detector with random weights everywhere, ready to train."""
    from lors_plugin.testing import randomize

    def make(kind='lors', seed=0, **changes):
        # BN goes into eval mode where `train` is called, not when built.
        return randomize(build(tiny_config(kind, **changes)), seed).train()

    return make


@pytest.fixture
def tiny_decoder(build, tiny_config):
    """The decoder alone, with random weights everywhere."""
    from lors_plugin.testing import randomize

    def make(kind='lors', seed=0, **changes):
        decoder = tiny_config(kind, decoder=changes)['decoder']
        return randomize(build(decoder), seed)

    return make


@pytest.fixture
def decoder_inputs():
    """Features, contents and boxes of a batch of 64 x 96 images."""
    import torch

    from lors_plugin.adamixer.box_geometry import boxes_from_sizes

    def make(
        batch=2,
        queries=7,
        embed_dims=32,
        feat_channels=32,
        strides=(4, 8, 16, 32),
        height=64,
        width=96,
    ):
        feats = [
            torch.randn(batch, feat_channels, height // s, width // s)
            for s in strides
        ]
        content = torch.randn(batch, queries, embed_dims)
        sizes = torch.tensor([[width, height]] * batch).float()
        xyzr = boxes_from_sizes(sizes)[:, None].repeat(1, queries, 1)
        return feats, content, xyzr + 0.3 * torch.randn(batch, queries, 4)

    return make


@pytest.fixture
def make_samples():
    """Data samples with random boxes: ``make_samples([2, 0], classes=3)``.

    ``shapes`` are the unpadded sizes (height, width), one or one an image.
    """
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def make(counts=(3, 2), classes=3, shapes=(64, 96), scale=1.0, seed=0):
        rng = torch.Generator().manual_seed(seed)
        if isinstance(shapes[0], int):
            shapes = [shapes] * len(counts)
        samples = []
        for i, (count, (height, width)) in enumerate(zip(counts, shapes)):
            size = torch.tensor([width, height] * 2).float()
            corners = torch.rand(count, 2, 2, generator=rng).sort(1).values
            boxes = corners.flatten(1).clamp(0.0, 0.9)
            boxes[:, 2:] += 0.1
            labels = torch.randint(classes, (count,), generator=rng)
            meta = dict(
                img_id=i,
                img_path=f'images/number{i}.jpg',
                img_shape=(height, width),
                ori_shape=(round(height / scale), round(width / scale)),
                batch_input_shape=tuple(map(max, zip(*shapes))),
                scale_factor=(scale, scale),
            )
            samples.append(
                DetDataSample(
                    gt_instances=InstanceData(
                        bboxes=boxes * size, labels=labels
                    ),
                    metainfo=meta,
                )
            )
        return samples

    return make


@pytest.fixture(scope='session')
def read_config():
    """A config file as it is; read once, since MMEngine takes its time."""
    from mmengine.config import Config

    import lors_plugin  # noqa: F401

    def make(path):
        if path not in CONFIGS:
            CONFIGS[path] = Config.fromfile(ROOT / path)
        return deepcopy(CONFIGS[path])

    return make


@pytest.fixture(scope='session')
def load_config(read_config):
    """A config file without pretrained weights of the model."""

    def make(path):
        config = read_config(path)
        remove_pretrained(config.model)
        return config

    return make


@pytest.fixture
def full_size(load_config):
    """The model of a config file without memory for its weights.

    ``full_size('configs/a.py', num_stages=3)`` with options of the decoder.
    Built once for all tests: leave it as it is.
    """
    from lors_plugin.analysis.weightless import EmptyWeights
    from lors_plugin.build import build_model

    def make(path, **decoder):
        config = load_config(path)
        if decoder:
            config.model.decoder.update(decoder)
        key = json.dumps([config.model, config.get('custom_hooks')])
        if key not in FULL_SIZE:
            with EmptyWeights():
                FULL_SIZE[key] = build_model(config)
        return FULL_SIZE[key]

    return make


@pytest.fixture
def narrow_config(load_config):
    """The model of a config file with few channels and points."""

    def make(path):
        model = load_config(path).model
        backbone = model.backbone
        if backbone.type in ('ResNet', 'ResNeXt'):
            backbone.base_channels, less = 8, 8
        elif backbone.type == 'SwinTransformer':
            backbone.embed_dims, less = backbone.embed_dims // 4, 4
        else:
            less = 1
        neck = model.neck
        neck.in_channels = [width // less for width in neck.in_channels]
        neck.out_channels = model.query_generator.embed_dims = 32
        model.decoder.update(
            embed_dims=32,
            in_points=4,
            out_points=8,
            feedforward_channels=32,
        )
        return model

    return make


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """Pretend that there are GPUs of a kind, of which nothing is known.

    ``pretend_gpu((7, 0), 'Tesla V100')`` returns what verdicts are about.
    """
    import torch

    from lors_plugin.ops import backend, self_check

    def forget():
        backend.device_verdict.cache_clear()
        self_check.forget()

    def make(capability=(8, 0), name='NVIDIA A100', triton=(3, 8, 0), count=1):
        for key, value in dict(
            is_available=lambda: True,
            device_count=lambda: count,
            get_device_capability=lambda index=None: capability,
            get_device_name=lambda index=None: name,
        ).items():
            monkeypatch.setattr(torch.cuda, key, value)
        monkeypatch.setattr(backend, 'triton_version', lambda: triton)
        forget()
        return self_check.find_card(0)

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for variable in (
        backend.ENV_NAME, self_check.ENV_NAME, 'TRITON_INTERPRET'
    ):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    yield make
    forget()


def remove_pretrained(config):
    """Take every ``init_cfg`` that loads a file out of a config."""
    if isinstance(config, dict):
        init = config.get('init_cfg')
        if isinstance(init, dict) and init.get('type') == 'Pretrained':
            config['init_cfg'] = None
        if 'pretrained' in config:
            config['pretrained'] = None
        for value in config.values():
            remove_pretrained(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            remove_pretrained(value)


@pytest.fixture
def goldens():
    """Directory of the goldens."""
    return Path(__file__).parent / 'data' / 'goldens'


@pytest.fixture(scope='session')
def root():
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope='module')
def browser():
    """A headless Chromium of the system."""
    playwright = pytest.importorskip('playwright.sync_api')
    names = ('chromium', 'chromium-browser', 'google-chrome')
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip('there is no Chromium: apt install chromium')
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=path, args=['--no-sandbox']
        )
        yield chromium
        chromium.close()
