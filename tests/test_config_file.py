"""Configs by name; their variables: overridden everywhere, or refused."""

import re

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from lors_plugin.config_file import (
    ConfigVariableError,
    check_inherited_variables,
    find_config,
    read_config,
)

BASE = """
max_epochs, lr = 12, 0.1
sizes = dict(long=8, short=[4, 2])
train_cfg = dict(max_epochs=max_epochs)
names = ('a', 'b')
steps = [dict(size=sizes['short']), dict(size=sizes)]
unused = 1
work = '{{ fileDirname }}'
if max_epochs > 2:
    lr = 0.2
optim_wrapper = dict(optimizer=dict(lr=lr))
model = dict(count=len(names), later={{ _base_.late }})
"""
DERIVED = """
_base_ = ['base.py']
data_root = 'd/'
train_dataloader = dict(file=data_root + 'a.json', epochs=_base_.max_epochs)
val_dataloader = dict(batch_size=1)
test_dataloader = val_dataloader
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of two files, beside a third one that both inherit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'late.py').write_text('late = 5\n')
    (tmp_path / 'base.py').write_text("_base_ = './late.py'\n" + BASE)
    (tmp_path / 'derived.py').write_text(DERIVED)
    return 'derived.py'


@pytest.mark.parametrize(
    ('options', 'entry', 'value'),
    [
        (dict(max_epochs=3), 'train_cfg.max_epochs', 3),
        (dict(max_epochs=3), 'train_dataloader.epochs', 3),
        (dict(max_epochs=1), 'optim_wrapper.optimizer.lr', 0.1),
        (dict(max_epochs=3), 'max_epochs', 3),
        (dict(lr=7.0), 'optim_wrapper.optimizer.lr', 7.0),
        (dict(names=['x']), 'model.count', 1),
        (dict(names=['x']), 'names', ('x',)),
        (dict(names=('x', 'y', "z'")), 'model.count', 3),
        (dict(data_root='e/'), 'train_dataloader.file', 'e/a.json'),
        (dict(late=6), 'model.later', 6),
        ({'sizes.long': 9}, 'steps.1.size.long', 9),
        ({'sizes.short.1': 9}, 'steps.0.size', [4, 9]),
        # Entries of their own, as for MMEngine.
        (dict(unused=2), 'unused', 2),
        ({'val_dataloader.batch_size': 4}, 'val_dataloader.batch_size', 4),
        ({'val_dataloader.batch_size': 4}, 'test_dataloader.batch_size', 1),
        # The last word is that of an entry.
        (
            {'max_epochs': 3, 'train_cfg.max_epochs': 2},
            'train_cfg.max_epochs',
            2,
        ),
    ],
)
def test_overridden_everywhere(config, options, entry, value):
    cfg = read_config(config, options)
    found = cfg
    for key in entry.split('.'):
        found = found[int(key) if key.isdigit() else key]
    assert found == value
    # Nothing else moves, and it is still that file.
    plain = Config.fromfile(config)
    assert cfg.keys() == plain.keys()
    assert cfg.work == plain.work
    assert (cfg.filename, cfg.text) == (plain.filename, plain.text)


def test_without_options_it_is_the_config_of_mmengine(config):
    assert read_config(config).to_dict() == Config.fromfile(config).to_dict()


@pytest.mark.parametrize(
    ('text', 'options', 'words'),
    [
        (
            "_base_ = 'mmdet::_base_/datasets/coco_detection.py'",
            dict(data_root='d/'),
            ['data_root', 'coco_detection.py', 'mmdet', 'line', ': train_dat'],
        ),
        (
            'for size in (1, 2):\n    a = size\nb = size',
            dict(size=3),
            ['size', 'loop'],
        ),
        ('a = dict(b=[1])\nc = a', {'a.b.7': 1}, ['a.b.7', 'IndexError']),
        ('a = (1, 2)\nc = len(a)', dict(a=5), ['--cfg-options a', 'len()']),
    ],
)
def test_refused_by_name(tmp_path, text, options, words):
    path = tmp_path / 'a.py'
    path.write_text(text + '\n')
    with pytest.raises(ConfigVariableError) as error:
        read_config(path, options)
    assert all(word in str(error.value) for word in words), error.value


def test_names_that_nothing_reads(config, capsys):
    MMLogger.get_instance('names')  # which writes where capsys looks
    read_config(config, {'max_epoch': 3, 'auto_scale_lr.enable': True})
    said = capsys.readouterr()
    text = said.out + said.err
    assert '--cfg-options max_epoch:' in text and 'mean max_epochs?' in text
    assert 'auto_scale_lr' not in text


@pytest.mark.parametrize(
    ('text', 'names'),
    [
        ('max_epochs = 3', ['max_epochs']),
        ('sizes = dict(long=9)', ['sizes']),
        ('names = ("a", "b", "c")\nlr = 0.2', ['names']),
        ('max_epochs, lr = 3, 4', ['max_epochs', 'lr']),
        # Used here, or by what inherits this; the same value; an entry.
        ('max_epochs = 3\ntrain_cfg = dict(max_epochs=max_epochs)', []),
        ('max_epochs = 12', []),
        ('unused = 3', []),
        ('model = dict(count=7)', []),
    ],
)
def test_inherited_variables_set_in_vain(config, tmp_path, text, names):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{config}'\n{text}\n")
    if not names:
        check_inherited_variables(path)
        return
    with pytest.raises(ConfigVariableError) as error:
        check_inherited_variables(path)
    for name in names:
        assert f'mine.py sets {name}, but' in str(error.value)
    assert str(error.value).count('base.py, line') == len(names)
    check_inherited_variables(path, dict.fromkeys(names))


def test_configs_by_file_and_by_package(config):
    name = 'lors-adamixer_r50_8xb2-1x_coco.py'
    assert find_config(config).name == config
    ours = find_config(f'lors_plugin::lors_adamixer/{name}')
    assert ours.is_file() and ours.name == name
    assert find_config(
        'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py'
    ).is_file()
    for wrong, expected in (
        (
            f'configs/lors_adamixer/{name}',
            f'lors_plugin::lors_adamixer/{name}',
        ),
        (f'lors_plugin::{name}', f'lors_plugin::lors_adamixer/{name}'),
        ('mmdet::yolov3_d53_8xb8-320-273e.py', 'mmdet::yolo/yolov3_d53_8xb8'),
        ('nowhere::a.py', 'nowhere is not installed'),
        ('no.py', 'there is no config no.py (current directory: '),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(expected)):
            find_config(wrong)
