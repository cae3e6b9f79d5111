"""``tools/convert_checkpoint.py``."""

import subprocess
import sys

import convert_checkpoint
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch.testing import assert_close

from lors_plugin.checkpoints import to_lors_plugin
from lors_plugin.testing import Golden


@pytest.fixture
def tool():
    return lambda *args: convert_checkpoint.main([str(arg) for arg in args])


@pytest.fixture
def original(goldens):
    golden = Golden(goldens / 'lors_detector_small.npz')
    return golden.original_weights()


def test_converts_and_back(tool, original, tmp_path, capsys):
    src, dst, back = (tmp_path / f'{n}.pth' for n in ('src', 'dst', 'back'))
    meta = dict(CLASSES=('tree', 'house'), epoch=12)
    torch.save(dict(meta=meta, state_dict=original, optimizer=dict(a=1)), src)
    assert tool(src, dst) == 0
    wanted = to_lors_plugin(original, 'lors')
    assert f'{len(wanted)} weights conv' in capsys.readouterr().out
    content = torch.load(dst, weights_only=True)
    assert sorted(content) == ['meta', 'state_dict']
    assert content['meta'] == meta
    assert_close(content['state_dict'], wanted, rtol=0, atol=0)

    assert tool(dst, back, '--reverse') == 0
    content = torch.load(back, weights_only=True)
    assert content['meta'] == meta
    for key, value in original.items():
        assert_close(content['state_dict'][key], value, rtol=0, atol=0)


def test_unknown_and_missing_keys_write_nothing(
    tool, original, tmp_path, capsys
):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    original['extra.weight'] = torch.zeros(1)
    missing = 'roi_head.bbox_head.1.fc_cls.bias'
    del original[missing]
    torch.save(dict(state_dict=original), src)
    assert tool(src, dst) == 1
    error = capsys.readouterr().err
    assert 'unknown keys: extra.weight' in error
    assert f'missing keys: {missing}' in error
    assert 'nothing was written' in error
    assert [p.name for p in tmp_path.iterdir()] == ['src.pth']


@pytest.mark.parametrize('file', ['lors_detector_small', 'parameternet_tiny'])
def test_files_that_are_converted_already(
    tool, goldens, tmp_path, capsys, file
):
    src, dst, new = (tmp_path / f'{n}.pth' for n in ('src', 'dst', 'new'))
    torch.save(Golden(goldens / f'{file}.npz').original_weights(), src)
    assert tool(src, new, '--reverse') == 1
    error = capsys.readouterr().err
    assert 'src.pth has the layout of the original program already' in error
    assert tool(src, dst) == 0 and tool(dst, new) == 1
    error = capsys.readouterr().err
    assert 'dst.pth has the layout of this package already' in error
    assert len(error) < 500 and not new.exists()


def test_class_names_for_the_old_framework(tool, tiny_detector, tmp_path):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    names = dict(classes=('tree', 'house'), palette=[(0, 0, 1), (0, 1, 0)])
    state = tiny_detector('lors').state_dict()
    meta = dict(dataset_meta=names, epoch=3)
    torch.save(dict(meta=meta, state_dict=state), src)
    assert tool(src, dst, '--reverse') == 0
    assert torch.load(dst, weights_only=True)['meta'] == dict(
        meta, CLASSES=names['classes'], PALETTE=names['palette']
    )


def test_file_without_a_backbone(tool, original, tmp_path, capsys):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    rest = {k: v for k, v in original.items() if 'backbone' not in k}
    torch.save(dict(state_dict=rest), src)
    assert tool(src, dst) == 1
    assert 'missing keys: there is no backbone' in capsys.readouterr().err
    assert not dst.exists()


def test_backbone_of_another_kind(tool, tiny_config, build, tmp_path, capsys):
    """Taken over as it is, with a warning; checked by a config."""
    model = tiny_config(
        'lors',
        backbone=dict(
            type='MobileNetV2', out_indices=(1, 2, 4, 6), depth=None
        ),
        neck=dict(in_channels=[24, 32, 96, 320]),
    )
    for name in ('depth', 'base_channels', 'norm_eval'):
        model['backbone'].pop(name)
    config, src, dst = (tmp_path / n for n in ('a.py', 'src.pth', 'dst.pth'))
    config.write_text(f'model = {model!r}')
    torch.save(dict(state_dict=build(model).state_dict()), src)
    assert tool(src, dst, '--reverse') == 0
    assert 'neither a ResNet(XT) nor a Swin' in capsys.readouterr().err
    content = torch.load(dst, weights_only=True)
    assert tool(dst, tmp_path / 'back.pth', '--config', config) == 0
    assert capsys.readouterr().err == ''

    del content['state_dict']['backbone.conv1.conv.weight']
    torch.save(content, dst)
    assert tool(dst, tmp_path / 'new.pth', '--config', config) == 1
    error = capsys.readouterr().err
    assert 'a.py does not fit' in error
    assert 'backbone.conv1.conv.weight' in error
    assert not (tmp_path / 'new.pth').exists()


@pytest.mark.parametrize(
    ('option', 'value'), [((), 2.0), (('--no-ema',), 1.0)]
)
def test_averaged_weights(tool, original, tmp_path, option, value):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    key = 'rpn_head.init_content_features.weight'
    plain = dict(original, **{key: torch.full((20, 64), 1.0)})
    mean = dict(original, **{key: torch.full((20, 64), 2.0)})
    swapped = {f'module.{k}': v for k, v in plain.items()}
    swapped['steps'] = torch.tensor(7)
    torch.save(dict(state_dict=mean, ema_state_dict=swapped), src)
    assert tool(src, dst, *option) == 0
    state = torch.load(dst, weights_only=True)['state_dict']
    assert (state['query_generator.content.weight'] == value).all()
    assert 'steps' not in state


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('none.pth', None, 'does not exist'),
        ('broken.pth', b'PK\x03\x04broken', 'broken.pth'),
    ],
)
def test_files_that_cannot_be_read(
    tool, tmp_path, capsys, name, content, message
):
    src, dst = tmp_path / name, tmp_path / 'dst.pth'
    if content:
        src.write_bytes(content)
    assert tool(src, dst) == 1
    assert message in capsys.readouterr().err
    assert not dst.exists()


def test_checkpoint_of_a_training_in_a_fresh_process(
    root, tiny_detector, tmp_path
):
    """History buffers are read without anything of MMEngine imported."""
    src, dst = tmp_path / 'epoch_1.pth', tmp_path / 'dst.pth'
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))
    state = tiny_detector('lors').state_dict()
    torch.save(dict(state_dict=state, message_hub=hub), src)
    command = [sys.executable, root / 'tools' / 'convert_checkpoint.py']
    done = subprocess.run(
        [*command, src, dst, '--reverse'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    back = torch.load(dst, weights_only=True)['state_dict']
    assert_close(to_lors_plugin(back, 'lors'), dict(state), rtol=0, atol=0)


def test_parameternet(tool, goldens, tmp_path, capsys):
    golden = Golden(goldens / 'parameternet_tiny.npz')
    released = golden.original_weights()
    src, dst, back = (tmp_path / f'{n}.pth' for n in ('src', 'dst', 'back'))
    torch.save(released, src)
    assert tool(src, dst) == 0
    assert 'from parameternet' in capsys.readouterr().out
    assert tool(dst, back, '--reverse') == 0
    content = torch.load(back, weights_only=True)['state_dict']
    assert_close(content, released, rtol=0, atol=0)
    assert tool(src, dst, '--source', 'lors') == 1


@pytest.fixture
def lors_config(tiny_config, tmp_path):
    """A LORS-AdaMixer of the sizes of the tiny AdaMixer."""
    path = tmp_path / 'lors.py'
    sizes = dict(num_groups=2, in_points=4)
    model = tiny_config('lors', decoder=sizes)
    path.write_text(f"default_scope = 'mmdet'\nmodel = {model!r}")
    return path


def test_an_adamixer_becomes_lors(
    tool, tiny_detector, build, lors_config, tmp_path, capsys
):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    state = tiny_detector('adamixer').state_dict()
    meta = dict(dataset_meta=dict(classes=('tree', 'house', 'car')), epoch=3)
    torch.save(dict(meta=meta, state_dict=state), src)
    assert tool(src, dst, '--to-lors', lors_config, '--images', 0) == 0
    out = capsys.readouterr().out
    assert 'stage  channel  spatial  projection' in out
    assert f'load_from={dst}' in out
    content = torch.load(dst, weights_only=True)
    assert content['meta'] == meta
    build(Config.fromfile(lors_config).model).load_state_dict(
        content['state_dict']
    )


def test_only_an_adamixer_of_the_sizes_becomes_lors(
    tool, tiny_detector, lors_config, tmp_path, capsys
):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    for detector, message in (
        (tiny_detector('lors'), 'src.pth is no AdaMixer (lors)'),
        (
            tiny_detector('adamixer', decoder=dict(in_points=8)),
            'no AdaMixer of the sizes of',
        ),
    ):
        torch.save(dict(state_dict=detector.state_dict()), src)
        assert tool(src, dst, '--to-lors', lors_config, '--images', 0) == 1
        assert message in capsys.readouterr().err
        assert not dst.exists()
