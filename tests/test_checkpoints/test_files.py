"""Checkpoint files: what is read, what is refused, what a crash leaves."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage
from torch.testing import assert_close

from lors_plugin.checkpoints import (
    ConversionError,
    load_checkpoint_file,
    save_checkpoint_file,
    weights_of,
)

STATE = {'a.weight': torch.tensor([1.0]), 'a.bias': torch.tensor([2.0])}


class Evil:
    """Runs code of its own when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_round_trip(tmp_path):
    path = tmp_path / 'new' / 'a.pth'
    save_checkpoint_file(dict(meta=dict(epoch=3), state_dict=STATE), path)
    content = load_checkpoint_file(path)
    assert content['meta'] == dict(epoch=3)
    assert_close(content['state_dict'], STATE)
    assert [p.name for p in path.parent.iterdir()] == ['a.pth']


def test_code_runs_only_with_trust(tmp_path):
    path, mark = tmp_path / 'evil.pth', tmp_path / 'mark'
    torch.save(dict(state_dict=STATE, evil=Evil(mark)), path)
    with pytest.raises(ConversionError, match='--trust'):
        load_checkpoint_file(path)
    assert not mark.exists()
    load_checkpoint_file(path, trust=True)
    assert mark.exists()


def test_history_of_mmengine_needs_no_trust(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    hub = dict(log_scalars={'train/loss': history}, runtime_info=dict(iter=2))
    torch.save(dict(state_dict=STATE, message_hub=hub), path)
    assert_close(load_checkpoint_file(path)['state_dict'], STATE)


def test_file_of_a_program_that_is_not_installed(tmp_path):
    path = tmp_path / 'old.pth'
    path.write_bytes(b'cnot_installed.module\nThing\n.')
    for trust in (False, True):
        with pytest.raises(ConversionError):
            load_checkpoint_file(path, trust)


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('share', [0.0, 0.5, 0.95])
def test_truncated_file(tmp_path, share, legacy, trust):
    path = tmp_path / 'a.pth'
    state = {f'w{i}': torch.randn(100) for i in range(20)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConversionError, match='a.pth'):
        load_checkpoint_file(path, trust)


def test_other_contents(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save([1, 2], path)
    with pytest.raises(ConversionError, match='holds a list, not a dict'):
        load_checkpoint_file(path)
    path.write_text('<html>404</html>')
    with pytest.raises(ConversionError, match='a.pth'):
        load_checkpoint_file(path)
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('readme.txt', 'nothing')
    with pytest.raises(ConversionError, match='cannot be read'):
        load_checkpoint_file(path)
    path.write_bytes(pickle.dumps({'a': 1}))
    with pytest.raises(ConversionError, match='a.pth'):
        load_checkpoint_file(path)


@pytest.mark.parametrize('name', ['none.pth', ''])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        load_checkpoint_file(tmp_path / name)


@pytest.mark.parametrize('kind', [OSError, RuntimeError])
def test_failure_while_writing_leaves_the_old_file(
    tmp_path, monkeypatch, kind
):
    path = tmp_path / 'a.pth'
    save_checkpoint_file(dict(state_dict=STATE), path)

    def full_disk(content, target):
        target.write_bytes(b'half of')
        raise kind('No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='No space left'):
        save_checkpoint_file(dict(state_dict={}), path)
    monkeypatch.undo()
    assert_close(load_checkpoint_file(path)['state_dict'], STATE)
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_failure_while_renaming_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save_checkpoint_file(dict(state_dict=STATE), path)

    def refuse(source, target):
        raise PermissionError('not here')

    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(PermissionError):
        save_checkpoint_file(dict(state_dict={}), path)
    assert_close(load_checkpoint_file(path)['state_dict'], STATE)
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


@pytest.mark.parametrize(
    'content',
    [STATE, dict(state_dict=STATE), dict(model=STATE), OrderedDict(STATE)],
    ids=['bare', 'state_dict', 'model', 'ordered'],
)
def test_weights_wherever_they_are(content):
    assert_close(weights_of(content), STATE)


def test_prefix_of_wrappers_goes():
    state = {f'module.{key}': value for key, value in STATE.items()}
    assert_close(weights_of(dict(state_dict=state)), STATE)
    state = {'a.module.weight': torch.zeros(1)}
    assert list(weights_of(state)) == ['a.module.weight']


@pytest.fixture
def averaged_checkpoint():
    """What MMEngine's EMAHook really writes, and both kinds of weights."""
    from mmengine.hooks import EMAHook

    model = torch.nn.Linear(2, 1)
    hook = EMAHook(momentum=0.5)
    hook.ema_model = ExponentialMovingAverage(model, momentum=0.5)
    hook.ema_model.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1)
    hook.ema_model.update_parameters(model)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    mean = {
        k: v.clone() for k, v in hook.ema_model.module.state_dict().items()
    }
    checkpoint = dict(state_dict=model.state_dict())
    hook.before_save_checkpoint(None, checkpoint)
    return checkpoint, plain, mean


def test_averaged_weights_of_mmengine(averaged_checkpoint):
    """They are the state dict; the plain ones lie under the other name."""
    checkpoint, plain, mean = averaged_checkpoint
    assert set(checkpoint['ema_state_dict']) == {
        'steps',
        'module.weight',
        'module.bias',
    }
    assert_close(weights_of(checkpoint), mean)
    assert_close(weights_of(checkpoint, ema=False), plain)
    assert (mean['weight'] != plain['weight']).any()


def test_averaged_weights_of_old_programs():
    state = dict(
        STATE,
        ema_a_weight=torch.tensor([10.0]),
        ema_a_bias=torch.tensor([20.0]),
        ema_other=torch.tensor([5.0]),
    )
    have = weights_of(dict(state_dict=state))
    assert_close(have.pop('ema_other'), torch.tensor([5.0]))
    wanted = {k: 10 * v for k, v in STATE.items()}
    assert_close(have, wanted)
    have = weights_of(dict(state_dict=state), ema=False)
    del have['ema_other']
    assert_close(have, STATE)


def test_state_dict_is_not_changed():
    state = {'module.a': torch.zeros(1), 'module.ema_a': torch.ones(1)}
    weights_of(dict(state_dict=state))
    assert list(state) == ['module.a', 'module.ema_a']
