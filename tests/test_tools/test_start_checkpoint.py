"""Checkpoints that ``train.py`` and ``test.py`` start from."""

import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures('in_tmp_path')


class Touch:
    """Makes a file when it is unpickled, as malicious code would."""

    def __reduce__(self):
        return os.makedirs, ('ran', 0o777, True)


def trained(train, config):
    """Train an epoch and return the path of its checkpoint."""
    assert train.main([config, '--work-dir', 'first']) == 0
    return 'first/epoch_1.pth'


@pytest.fixture
def malicious(tools, classification):
    content = torch.load(trained(tools[0], classification), weights_only=False)
    torch.save(dict(content, extra=Touch()), 'bad.pth')
    return 'bad.pth'


@pytest.mark.parametrize('how', ['test', 'load_from', 'resume', 'auto'])
def test_code_in_a_checkpoint_does_not_run(
    tools, classification, malicious, fails, how
):
    train, test = tools
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


def test_trusted_checkpoint_is_read(
    tools, classification, malicious, monkeypatch
):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '0')
    assert tools[1].main([classification, malicious, '--trust']) == 0
    assert Path('ran').exists()


def test_newest_checkpoint_of_another_model(tools, classification, fails):
    train, _ = tools
    trained(train, classification)
    more = ['--work-dir', 'first', '--resume', '--cfg-options']
    more += ['train_cfg.max_epochs=2', 'model.head.in_channels=60']
    text = fails(train.main, classification, *more)
    assert 'epoch_1.pth does not fit the model of this config' in text
    assert not Path('first/epoch_2.pth').exists()

    Path('first/epoch_1.pth').unlink()
    text = fails(train.main, classification, *more[:3])
    assert 'first/last_checkpoint: the checkpoint file' in text


def test_nothing_to_resume_from(tools, classification, capsys):
    argv = [classification, '--work-dir', 'new', '--resume']
    assert tools[0].main(argv) == 0
    out = ''.join(capsys.readouterr())
    assert 'no checkpoint in new; training starts from the beginning' in out
    assert Path('new/epoch_1.pth').exists()
