"""Checkpoints that ``train.py`` and ``test.py`` start from."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import test
import torch
import train

pytestmark = pytest.mark.usefixtures('in_tmp_path')


class Touch:
    """Makes a file when it is unpickled, as malicious code would."""

    def __reduce__(self):
        return os.makedirs, ('ran', 0o777, True)


def trained(config):
    """Train an epoch and return the path of its checkpoint."""
    assert train.main([config, '--work-dir', 'first']) == 0
    return 'first/epoch_1.pth'


@pytest.fixture
def malicious(classification):
    content = torch.load(trained(classification), weights_only=False)
    torch.save(dict(content, extra=Touch()), 'bad.pth')
    return 'bad.pth'


@pytest.mark.parametrize('how', ['test', 'load_from', 'resume', 'auto'])
def test_code_in_a_checkpoint_does_not_run(
    classification, malicious, fails, how
):
    if how == 'test':
        text = fails(test.main, classification, malicious)
    elif how == 'load_from':
        option = ['--cfg-options', f'load_from={malicious}']
        text = fails(train.main, classification, *option)
    elif how == 'resume':
        text = fails(train.main, classification, '--resume', malicious)
    else:
        Path('first/last_checkpoint').write_text(malicious)
        argv = [classification, '--work-dir', 'first', '--resume']
        text = fails(train.main, *argv)
    assert 'bad.pth' in text
    assert '--trust' in text
    assert not Path('ran').exists()


def test_trusted_checkpoint_is_read(classification, malicious, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '0')
    assert test.main([classification, malicious, '--trust']) == 0
    assert Path('ran').exists()


def test_newest_checkpoint_of_another_model(classification, fails):
    trained(classification)
    more = ['--work-dir', 'first', '--resume', '--cfg-options']
    more += ['train_cfg.max_epochs=2', 'model.head.in_channels=60']
    text = fails(train.main, classification, *more)
    assert 'epoch_1.pth does not fit the model of this config' in text
    assert not Path('first/epoch_2.pth').exists()

    Path('first/epoch_1.pth').unlink()
    text = fails(train.main, classification, *more[:3])
    assert 'first/last_checkpoint: the checkpoint file' in text


def test_nothing_to_resume_from(classification, capsys):
    argv = [classification, '--work-dir', 'new', '--resume']
    assert train.main(argv) == 0
    out = ''.join(capsys.readouterr())
    assert 'no checkpoint in new; training starts from the beginning' in out
    assert Path('new/epoch_1.pth').exists()


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-400])


def flip_bit_of_a_weight(path):
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
        start = path.read_bytes().index(archive.read(entry))
    content = bytearray(path.read_bytes())
    content[start] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('damage', 'why'),
    [
        (lambda last: Path('first/last_checkpoint').unlink(), 'is missing'),
        (lambda last: last.unlink(), 'epoch_2.pth does not exist'),
        (cut_off, 'epoch_2.pth'),
        (flip_bit_of_a_weight, 'epoch_2.pth'),
        (lambda last: last.write_bytes(b''), 'epoch_2.pth'),
        (
            lambda last: Path('first/last_checkpoint').write_text(''),
            'it is empty',
        ),
    ],
)
def test_newest_whole_checkpoint(classification, capsys, damage, why):
    """One line says why and from which file the training goes on."""
    argv = [classification, '--work-dir', 'first', '--cfg-options']
    assert train.main([*argv, 'train_cfg.max_epochs=2']) == 0
    first, last = Path('first/epoch_1.pth'), Path('first/epoch_2.pth')
    torch.save(dict(state_dict={}), 'first/weights.pth')  # of no training
    damage(last)
    os.utime(first, (1, 1))
    whole = last if why in ('is missing', 'it is empty') else first
    capsys.readouterr()
    argv.insert(1, '--resume')
    assert train.main([*argv, 'train_cfg.max_epochs=3']) == 0
    text = ''.join(capsys.readouterr())
    (line,) = [x for x in text.splitlines() if 'newest whole' in x]
    assert why in line
    assert f'going on from {whole}' in line
    assert f'resumed epoch: {2 if whole is last else 1}' in text
    assert Path('first/last_checkpoint').read_text().endswith('epoch_3.pth')


def test_no_whole_checkpoint(classification, fails):
    trained(classification)
    cut_off(Path('first/epoch_1.pth'))
    argv = [classification, '--work-dir', 'first', '--resume']
    for _ in range(2):
        text = fails(train.main, *argv)
        assert 'no whole checkpoint to go on from' in text
        assert 'epoch_1.pth' in text
        assert '--resume CHECKPOINT' in text
        Path('first/last_checkpoint').unlink(missing_ok=True)


LOCK = """
import sys
from lors_plugin.engine.run_lock import run_lock
with run_lock('first'):
    print('locked', flush=True)
    sys.stdin.read()
"""


def test_work_directory_in_use(classification, fails, capsys):
    """The message names the process; a dead one locks nothing."""
    other = subprocess.Popen(
        [sys.executable, '-c', LOCK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert 'locked' in other.stdout.readline()
    argv = [classification, '--work-dir', 'first']
    text = fails(train.main, *argv)
    assert f'first is in use by process {other.pid} on ' in text
    assert '--ignore-lock' in text
    assert os.listdir('first') == ['.lock']
    assert train.main([*argv, '--ignore-lock']) == 0
    assert f'process {other.pid}' in ''.join(capsys.readouterr())
    other.kill()
    other.wait()
    assert train.main(argv) == 0


def test_work_directory_that_cannot_be_written(classification, fails):
    Path('file').write_text('')
    text = fails(train.main, classification, '--work-dir', 'file/first')
    assert 'file/first cannot be written to (Not a directory)' in text
    assert '--work-dir' in text
