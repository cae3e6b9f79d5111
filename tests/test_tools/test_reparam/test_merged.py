"""tools/reparam.py, from trained files to stock models that load them."""

import subprocess
import sys

import pytest
import reparam
import torch
from mmengine.config import Config
from stock_process import BLOCKED

from lors_plugin.adapters import load_adapter_checkpoint
from lors_plugin.reparam.compare import prepare
from lors_plugin.reparam.structure import build_base

HOSTS = [
    'vit',
    'vit-no-bias',
    'beit',
    'swin',
    'convnext',
    'resnet',
    'mobilenet',
    'detector',
    'detector-no-bias',
    'two-stage',
]
IMAGES = list(
    torch.randint(
        256,
        (2, 3, 32, 32),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.uint8,
    )
)
FAST = ['--shape', '32', '32', '--repeats', '0']

STOCK = (
    BLOCKED
    + """
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
inputs = torch.load('inputs.pth')
for name in sys.argv[1:]:
    cfg = Config.fromfile(f'{name}/out.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    file = torch.load(f'{name}/out.pth', weights_only=True)
    model.load_state_dict(file['state_dict'], strict=True)
    # Two stages want more than images.
    run = model.extract_feat if hasattr(model, 'roi_head') else model
    with torch.no_grad():
        torch.save(run(inputs[name]), f'{name}/stock.pth')
assert 'lors_plugin' not in sys.modules
"""
)


@pytest.fixture(scope='module')
def merged(hosts, tmp_path_factory):
    """All hosts by the tool; directory, trained models and their outputs."""
    root = tmp_path_factory.mktemp('merged')
    inputs, outputs = {}, {}
    for name in HOSTS:
        folder = root / name
        folder.mkdir()
        model = hosts.make(name, folder)
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        argv = [str(config), str(checkpoint), str(folder / 'out.pth'), *FAST]
        assert reparam.main(argv) == 0
        inputs[name] = prepare(model, IMAGES)['inputs']
        run = model.extract_feat if hasattr(model, 'roi_head') else model
        with torch.no_grad():
            outputs[name] = run(inputs[name])
    torch.save(inputs, root / 'inputs.pth')
    subprocess.run([sys.executable, '-c', STOCK, *HOSTS], cwd=root, check=True)
    return root, outputs


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)]


@pytest.mark.slow
@pytest.mark.parametrize('name', HOSTS)
def test_stock_hosts_load_it_without_the_plugin(merged, name):
    root, outputs = merged
    stock = tensors(torch.load(root / name / 'stock.pth'))
    wanted = tensors(outputs[name])
    assert len(stock) == len(wanted)
    for value, other in zip(stock, wanted):
        scale = other.abs().max()
        torch.testing.assert_close(value / scale, other / scale)


@pytest.mark.parametrize('name', ['vit', 'detector'])
def test_what_is_kept_and_what_is_not(merged, name):
    folder = merged[0] / name
    content = torch.load(folder / 'out.pth', weights_only=True)
    assert content.keys() == {'meta', 'state_dict'}
    assert content['meta']['dataset_meta'] == dict(classes=['a', 'b', 'c'])
    assert content['meta']['epoch'] == 3
    assert 'hook_msgs' not in content['meta']
    text = (folder / 'out.py').read_text()
    for word in ('lors_plugin', 'rep_adapter', 'nowhere'):
        assert word not in text and word not in content['meta']['cfg']
    cfg = Config.fromfile(folder / 'out.py')
    if name == 'vit':
        assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    else:
        assert 'custom_hooks' not in cfg
        evaluator = dict(cfg.test_evaluator)
        assert evaluator.pop('type') == 'mmdet.CocoMetric'
        assert evaluator == dict(metric='bbox', ann_file='a.json')


def test_adapter_files_in_turn(hosts, tmp_path, capsys):
    folders = []
    for task in ('a', 'b'):
        folder = tmp_path / task
        folder.mkdir()
        hosts.make('vit', folder)
        folders.append(folder)
    adapter = torch.load(tmp_path / 'b/adapter.pth')
    for key, value in adapter['state_dict'].items():
        if key.startswith('head') or key.endswith('up_weight'):
            value.mul_(-2)
    torch.save(adapter, tmp_path / 'b/adapter.pth')
    base = tmp_path / 'a/base.pth'
    before = base.read_bytes()
    files = [str(folder / 'adapter.pth') for folder in folders]
    config, out = str(tmp_path / 'a/vit.py'), tmp_path / 'out'
    argv = [config, str(out), '--base', str(base), '--adapter', *files, *FAST]
    assert reparam.main(argv) == 0
    assert base.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == [
        'a_adapter.pth', 'a_adapter.py', 'b_adapter.pth', 'b_adapter.py'
    ]  # fmt: skip
    cfg = Config.fromfile(config)
    outputs = []
    for name, file in zip('ab', files):
        model = build_base(cfg)
        model.load_state_dict(torch.load(base)['state_dict'])
        load_adapter_checkpoint(model, file)
        inputs = prepare(model.eval(), IMAGES)['inputs']
        plain = build_base(Config.fromfile(out / f'{name}_adapter.py'))
        state = torch.load(out / f'{name}_adapter.pth')['state_dict']
        plain.load_state_dict(state, strict=True)
        with torch.no_grad():
            outputs.append(model(inputs))
            torch.testing.assert_close(plain(inputs), outputs[-1])
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
