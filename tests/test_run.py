"""``python -m lors_plugin.run``: tools of hosts, scripts, modules."""

import os
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config, utils
from mmengine.hub import get_config

from lors_plugin.compat import register_configs
from lors_plugin.run import COMMANDS, find_tool, main

SCRIPT = """
import sys
import beside
from mmcv.ops import nms
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import CheckpointLoader
print(__name__, sys.argv[1:], beside.X)
for read in (load, CheckpointLoader.load_checkpoint):
    try:
        read('bad.pkl' if read is load else 'bad.pth')
    except Exception as error:
        print('refused' if '--trust' in str(error) else error)
"""
BAD = b"cos\nmakedirs\n(S'ran'\ntR."


@pytest.mark.parametrize('trust', [False, True])
def test_a_script(quick_python, tmp_path, trust):
    """It runs as by itself, with modules beside it; files run no code."""
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'a.py').write_text(SCRIPT)
    (folder / 'beside.py').write_text('X = 7')
    for name in ('bad.pkl', 'bad.pth'):
        (tmp_path / name).write_bytes(BAD)
    command = [quick_python, '-m', 'lors_plugin.run']
    command += ['--trust'] * trust + ['scripts/a.py', 'b', '--trust']
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=root),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "__main__ ['b', '--trust'] 7" in done.stdout
    assert done.stdout.count('refused') == (0 if trust else 2)
    assert (tmp_path / 'ran').exists() == trust


def test_tools_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('own.py').write_text('')
    path, is_file = find_tool('mmdet::analysis_tools/browse_dataset.py')
    assert is_file and Path(path).is_file()
    assert find_tool('own.py') == ('own.py', True)
    assert find_tool('json.tool') == ('json.tool', False)


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_are_tools_of_this_package(name, tmp_path, monkeypatch):
    """Whatever lies in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('')
    path, is_file = find_tool(name)
    assert is_file == (name != 'doctor')
    if is_file:
        assert Path(path).is_absolute() and Path(path).is_file()


@pytest.mark.parametrize(
    ('name', 'word'),
    [
        ('none.py', 'nor a file'),
        ('no.such.module', 'nor a module'),
        ('nowhere::train.py', 'nowhere is not installed'),
        ('mmdet::none.py', 'none.py'),
    ],
)
def test_tools_that_are_none(capsys, name, word):
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert name in error and word in error
    assert 'lors_plugin [--trust] TOOL' in error


def test_help(capsys):
    assert main(['--help']) == 0 and main([]) == 2
    assert 'mmdet::analysis_tools' in capsys.readouterr().out


def test_configs_inherit_ours(tmp_path, monkeypatch):
    """And their types are looked for as in a config that lies beside."""
    package = tmp_path / 'lors_plugin'
    (package / '.mim' / 'configs' / 'a').mkdir(parents=True)
    (package / '.mim' / 'model-index.yml').write_text('Import: []')
    (package / '.mim' / 'configs' / 'a' / 'b.py').write_text(
        "model = dict(type='X', parts=[dict(type='Y')])\nlr = 1\n"
    )
    where = 'mmengine.{}.get_installed_path'
    for module in ('config.config', 'hub.hub'):
        monkeypatch.setattr(where.format(module), lambda name: str(package))
    path = tmp_path / 'c.py'
    path.write_text(
        "_base_ = 'lors_plugin::a/b.py'\nmodel = dict(type='Z')\n"
        'again = _base_.model\n'
    )
    register_configs()
    register_configs()  # once is enough, twice is no harm
    cfg = Config.fromfile(path)
    assert cfg.to_dict() == dict(
        model=dict(type='Z', parts=[dict(type='Y')]),
        again=dict(type='X', parts=[dict(type='Y')]),
        lr=1,
    )
    misses = utils.load.cache_info().misses
    assert get_config('lors_plugin::a/b.py').lr == 1
    # The metafiles are known by now.
    assert utils.load.cache_info().misses == misses > 0
