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


@pytest.mark.parametrize('how', ['test', 'load_from', 'resume'])
def test_code_in_a_checkpoint_does_not_run(
    tools, classification, malicious, fails, how
):
    train, test = tools
    if how == 'test':
        text = fails(test.main, classification, malicious)
    elif how == 'load_from':
        option = ['--cfg-options', f'load_from={malicious}']
        text = fails(train.main, classification, *option)
    else:
        text = fails(train.main, classification, '--resume', malicious)
    assert 'bad.pth' in text
    assert '--trust' in text
    assert not Path('ran').exists()


def test_trusted_checkpoint_is_read(
    tools, classification, malicious, monkeypatch
):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '0')
    assert tools[1].main([classification, malicious, '--trust']) == 0
    assert Path('ran').exists()
