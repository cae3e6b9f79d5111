"""Files made to run code, by every way in which a tool reads one."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import test
import torch
import train
from mmengine.config import Config
from mmengine.logging import MMLogger

from lors_plugin.compat import read_safely

pytestmark = pytest.mark.usefixtures('in_tmp_path')

TEXT = "import os\nos.makedirs('ran', exist_ok=True)\n"


class Code:
    """Makes a folder when it is unpickled, as malicious code would."""

    def __reduce__(self):
        return os.makedirs, ('ran', 0o777, True)


@pytest.fixture(autouse=True)
def nothing_ran(in_tmp_path):
    # Two runs of one second would share their name and with it the logger.
    MMLogger._instance_dict.clear()
    yield
    assert not Path('ran').exists()


@pytest.fixture(scope='module')
def kept():
    """What tests leave for the next ones."""
    return {}


@pytest.fixture
def trained(classification, kept):
    """A checkpoint after one epoch."""
    path = Path('first/epoch_1.pth')
    if 'trained' in kept:
        path.parent.mkdir()
        path.write_bytes(kept['trained'])
    else:
        assert train.main([classification, '--work-dir', 'first']) == 0
        kept['trained'] = path.read_bytes()
    return str(path)


def with_texts(path, out='crafted.pth'):
    """Plain values only, but where MMEngine looks for a config, code."""
    content = torch.load(path, weights_only=True)
    content['meta'].update(config=TEXT, cfg=TEXT)
    content['message_hub']['runtime_info']['cfg'] = TEXT
    torch.save(content, out)
    return out


@pytest.fixture
def crafted(trained):
    return with_texts(trained)


@pytest.mark.parametrize('how', ['file', 'trust', 'auto', 'options'])
def test_config_in_a_checkpoint_is_not_executed(classification, crafted, how):
    argv = [classification, '--work-dir', 'first']
    options = ['--cfg-options', 'train_cfg.max_epochs=2']
    if how == 'file':
        argv += ['--resume', crafted]
    elif how == 'trust':
        argv += ['--resume', crafted, '--trust']
    elif how == 'auto':
        Path('first/last_checkpoint').write_text(crafted)
        argv += ['--resume']
    else:
        options += ['resume=True', f'load_from={crafted}']
    assert train.main([*argv, *options]) == 0
    written = Path('first/epoch_2.pth')
    # Nor is it handed on to those who read the next checkpoint.
    assert b'makedirs' not in written.read_bytes()
    assert torch.load(written, weights_only=True)['meta']['epoch'] == 2


@pytest.mark.parametrize('how', ['load_from', 'init_cfg'])
def test_weights_to_start_from(classification, crafted, how):
    options = [f'load_from={crafted}']
    if how == 'init_cfg':
        prefix = 'model.head.init_cfg'
        options = [f'{prefix}.type=Pretrained', f'{prefix}.prefix=head']
        options += [f'{prefix}.checkpoint={crafted}']
    argv = [classification, '--cfg-options', *options]
    assert train.main(argv) == 0


def test_testing(classification, crafted):
    assert test.main([classification, crafted]) == 0


def test_inferencer(trained):
    """Which takes its config from the file, if it is given none."""
    from mmengine.infer import BaseInferencer
    from mmpretrain import ImageClassificationInferencer

    crafted = with_texts(trained)
    read_safely()
    with pytest.raises(ValueError, match='Cannot find the config'):
        BaseInferencer._init_model(
            object.__new__(ImageClassificationInferencer), {}, crafted
        )


TRANSFORMER = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=24, num_layers=1, num_heads=2, feedforward_channels=48
        ),
        img_size=32,
        patch_size=16,
    ),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=24),
    data_preprocessor=dict(mean=[128] * 3, std=[64] * 3, num_classes=3),
)
HOOK = dict(type='lors_plugin.RepAdapterHook', adapter_only=True)


@pytest.fixture
def adapted(classification):
    """A config with adapters, its base, and a file of adapters alone."""
    cfg = Config.fromfile(classification)
    for phase in ('train', 'val', 'test'):
        dataset = cfg[f'{phase}_dataloader'].dataset
        dataset.pipeline[0].color_type = 'color'
    cfg.model = TRANSFORMER
    cfg.dump('base.py')
    assert train.main(['base.py', '--work-dir', 'base']) == 0
    cfg.custom_hooks = [dict(HOOK, base='base/epoch_1.pth')]
    cfg.dump('adapted.py')
    assert train.main(['adapted.py', '--work-dir', 'first']) == 0
    return 'adapted.py', 'first/epoch_1.pth'


def test_adapter_file(adapted, fails):
    config, path = adapted
    argv = [config, '--work-dir', 'first', '--resume', with_texts(path)]
    more = ['--cfg-options', 'train_cfg.max_epochs=2']
    assert train.main([*argv, *more]) == 0
    assert b'makedirs' not in Path('first/epoch_2.pth').read_bytes()

    torch.save(dict(torch.load(path), extra=Code()), 'bad.pth')
    assert 'bad.pth' in fails(train.main, config, '--resume', 'bad.pth')
    hook = 'custom_hooks.0.base=bad.pth'
    text = fails(train.main, config, '--cfg-options', hook)
    assert 'bad.pth' in text and '--trust' in text


def write_bad(path, kind='zip'):
    """Write a file that runs code when it is read as the host reads it."""
    content = dict(state_dict={'a': torch.zeros(1)}, meta=Code())
    if kind == 'pickle':
        Path(path).write_bytes(pickle.dumps(content, protocol=2))
    elif kind == 'legacy':
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == 'tar':  # PyTorch before 2.6 unpacks it
        with tarfile.open(path, 'w') as file:
            entry = tarfile.TarInfo('storages')
            file.addfile(entry, io.BytesIO())
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize('kind', ['zip', 'pickle', 'legacy', 'tar'])
def test_pickles_of_all_formats(classification, fails, kind):
    text = fails(test.main, classification, write_bad('bad.pth', kind))
    assert 'bad.pth' in text.splitlines()[-1] and '--trust' in text


def test_pretrained_part(classification, fails):
    prefix = 'model.head.init_cfg'
    options = [f'{prefix}.type=Pretrained', f'{prefix}.checkpoint=bad.pth']
    argv = [classification, '--cfg-options', *options]
    assert 'bad.pth does not exist' in fails(train.main, *argv)
    write_bad('bad.pth')
    text = fails(train.main, *argv)
    assert 'bad.pth' in text and '--trust' in text


def test_yaml_config(fails):
    """MMEngine's reader of YAML calls what a file names."""
    text = 'model: !!python/object/apply:os.makedirs [ran]'
    Path('config.yaml').write_text(text)
    assert 'config.yaml' in fails(train.main, 'config.yaml')


@pytest.mark.parametrize('form', ['pkl', 'yaml'])
def test_annotations(classification, fails, form):
    """MMEngine unpickles those, and its YAML calls what a file names."""
    images = sorted(str(p.resolve()) for p in Path('images').rglob('*.png'))
    data = [dict(img_path=image, gt_label=[0]) for image in images]
    content = dict(metainfo=dict(classes=tuple('abc')), data_list=data)
    cfg = Config.fromfile(classification)
    dataset = cfg.train_dataloader.dataset
    dataset.update(type='MultiLabelDataset', ann_file=f'../a.{form}')
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.dump('config.py')
    for bad in (False, True):
        if form == 'pkl':
            more = dict(extra=Code()) if bad else {}
            Path('a.pkl').write_bytes(pickle.dumps({**content, **more}))
        else:
            content['metainfo']['classes'] = list('abc')
            more = '!!python/object/apply:os.makedirs [ran]'
            more = f'\nextra: {more}\n' if bad else '\n'
            # JSON is YAML, too.
            lines = [f'{k}: {json.dumps(v)}' for k, v in content.items()]
            Path('a.yaml').write_text('\n'.join(lines) + more)
        if bad:
            assert '--trust' in fails(train.main, 'config.py')
        else:
            assert train.main(['config.py']) == 0


def test_state_of_strange_types(classification, trained, fails):
    content = torch.load(trained, weights_only=True)
    content['meta']['epoch'] = [TEXT]
    torch.save(content, 'odd.pth')
    argv = [classification, '--work-dir', 'first', '--resume', 'odd.pth']
    text = fails(train.main, *argv)
    assert 'odd.pth is no checkpoint that' in text and 'meta.epoch' in text


def test_weights_are_not_resumed(classification, trained, fails):
    torch.save(torch.load(trained)['state_dict'], 'bare.pth')
    argv = [classification, '--work-dir', 'first']
    text = fails(train.main, *argv, '--resume', 'bare.pth')
    assert 'bare.pth holds weights without the state of a training' in text


def test_wrapped_weights_are_the_same(classification, trained, capsys):
    content = torch.load(trained)
    state = content['state_dict']
    content['state_dict'] = {
        f'module._orig_mod.{k}': v for k, v in state.items()
    }
    torch.save(content, 'wrapped.pth')
    options = ['--cfg-options', 'train_cfg.max_epochs=2']
    found = []
    for path in (trained, 'wrapped.pth'):
        argv = [classification, '--work-dir', 'second', '--resume', path]
        assert train.main([*argv, *options]) == 0
        found.append(torch.load('second/epoch_2.pth')['state_dict'])
    assert 'do not match' not in ''.join(capsys.readouterr())
    assert found[0].keys() == found[1].keys()
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


def test_safetensors(classification, trained, capsys):
    safetensors = pytest.importorskip('safetensors.torch')
    state = torch.load(trained)['state_dict']
    meta = dict(meta=json.dumps(dict(config=TEXT, cfg=TEXT)))
    safetensors.save_file(state, 'w.safetensors', meta)
    assert test.main([classification, 'w.safetensors']) == 0
    assert 'do not match' not in ''.join(capsys.readouterr())
