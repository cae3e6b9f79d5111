"""Checkpoint files: what is read, what is refused, what a crash leaves."""

import io
import os
import pickle
import tarfile
import threading
import zipfile
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import ExponentialMovingAverage
from torch.testing import assert_close

from lors_plugin.checkpoints import (
    ConversionError,
    load_checkpoint_file,
    read_weights,
    save_checkpoint_file,
    weights_of,
)
from lors_plugin.checkpoints.files import set_torch_policy, torch_policy
from lors_plugin.checkpoints.for_host import content_for_host

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


def script(path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)


def archive(path):
    with tarfile.open(path, 'w') as file:
        file.addfile(tarfile.TarInfo('../storages'), io.BytesIO())


@pytest.mark.parametrize('write', [script, archive])
def test_formats_that_old_pytorch_reads_unsafely(tmp_path, write):
    write(tmp_path / 'a.pth')
    with pytest.raises(ConversionError, match='--trust'):
        load_checkpoint_file(tmp_path / 'a.pth')


def test_damage_of_any_kind_is_named_in_one_line(tmp_path):
    """Each byte of a small file turned, one after the other."""
    path = tmp_path / 'a.pth'
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    seen = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            load_checkpoint_file(path)
        except ConversionError as error:
            seen += 1
            assert str(path) in str(error) and '\n' not in str(error)
    assert seen > 20


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('bit', [0, 30])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path, bit, trust):
    """Which PyTorch does not compare: the weight would be another one."""
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(w=torch.full((9,), 1.5))), path)
    whole = bytearray(path.read_bytes())
    place = whole.index(torch.full((9,), 1.5).numpy().tobytes())
    whole[place + bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    assert not torch.load(path)['state_dict']['w'].eq(1.5).all()
    with pytest.raises(ConversionError, match='a.pth is damaged.*checksum'):
        load_checkpoint_file(path, trust)


NAN, INF = float('nan'), float('inf')
ODD = dict(
    nan=(torch.tensor([1, NAN]), '1 of 2 weights hold NaN.*: w'),
    half=(torch.tensor([NAN]).half(), 'hold NaN'),
    float8=(torch.tensor([NAN]).to(torch.float8_e5m2), 'hold NaN'),
    complex=(torch.tensor([complex(0, NAN)]), 'hold NaN'),
    meta=(torch.empty(2, device='meta'), r'no plain values.*: w \(.*meta'),
    sparse=(torch.eye(2).to_sparse(), r'no plain values.*w \(torch.sparse'),
    repeated=(torch.zeros(1).expand(2**40), r'w \(.*of fewer values'),
    csr=(torch.eye(2).to_sparse_csr(), 'no plain values'),
    quantized=(
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        r'w \(torch.qint8\)',
    ),
)


@pytest.mark.filterwarnings('ignore')  # some of these are in beta
@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('where', ['state_dict', 'ema_state_dict', ''])
def test_weights_that_are_none(tmp_path, name, where):
    value, words = ODD[name]
    state = dict(STATE, w=value)
    del state['a.bias']
    content = {'state_dict': STATE, where: state} if where else state
    path = tmp_path / 'a.pth'
    torch.save(content, path)
    with pytest.raises(ConversionError, match=words):
        load_checkpoint_file(path)
    with pytest.raises(ConversionError, match=words):
        content_for_host(content, path)


def test_infinities_are_told(tmp_path, capsys):
    """Masks hold them, so they are no mistake for sure."""
    MMLogger.get_instance('infinities')  # which writes where capsys looks
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(STATE, w=torch.tensor([INF]))), path)
    assert load_checkpoint_file(path)['state_dict']['w'] == INF
    said = capsys.readouterr()
    assert 'a.pth: 1 of 3 weights hold inf: w' in said.out + said.err


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


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('none.pth', 'none.pth does not exist'),
        ('', 'is a directory'),
        ('pipe.pth', 'is no file'),
        ('pipe.safetensors', 'is no file'),
        ('circle.pth', 'cannot be read: Too many levels'),
    ],
)
def test_no_file(tmp_path, name, why):
    path = tmp_path / name
    if path.stem == 'pipe':
        os.mkfifo(path)
    elif path.stem == 'circle':
        path.symlink_to(path)
    with pytest.raises(FileNotFoundError, match=why):
        load_checkpoint_file(path)


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('rank0.pth', "strategy.state_dict_cfg='full'"),
        ('mp_rank_00_model_states.pt', '-m deepspeed.utils.zero_to_fp32 '),
        (
            'zero_pp_rank_0_mp_rank_00_model_states.pt',
            r'RUN RUN/whole -t epoch_2.pth. and name RUN/whole/pytorch_model',
        ),
    ],
)
def test_directories_of_sharded_training(tmp_path, name, why):
    """How one file comes of them."""
    folder = tmp_path / 'epoch_2.pth'
    folder.mkdir()
    (folder / name).touch()
    why = why.replace('RUN', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f'is a directory of .*{why}'):
        load_checkpoint_file(folder)


@pytest.mark.parametrize('trust', [False, True])
def test_archive_that_would_fill_the_memory(tmp_path, trust):
    whole, path = tmp_path / 'whole.pth', tmp_path / 'a.pth'
    torch.save(dict(w=torch.zeros(2**16)), whole)
    packed = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), packed)
    assert 'w' in torch.load(path, weights_only=True)
    with pytest.raises(ConversionError, match='would unpack to'):
        load_checkpoint_file(path, trust)


def test_threads_do_not_mix_up_whether_files_are_trusted():
    """One would restore what another one had set for its own file."""
    set_torch_policy(False)
    before = dict(os.environ)
    entered, leave = threading.Event(), threading.Event()

    def second():
        with torch_policy(True):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=second)
    with torch_policy(True):
        thread.start()
        assert not entered.wait(0.2)
    leave.set()
    thread.join()
    assert os.environ == before


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
    [
        STATE,
        dict(state_dict=STATE),
        dict(model=STATE),
        dict(module=STATE),  # DeepSpeed
        OrderedDict(STATE),
    ],
    ids=['bare', 'state_dict', 'model', 'module', 'ordered'],
)
def test_weights_wherever_they_are(content):
    assert_close(weights_of(content), STATE)
    # EMAHook of MMEngine looks nowhere else.
    assert_close(content_for_host(content, 'a.pth')['state_dict'], STATE)


@pytest.mark.parametrize('name', ['model', 'module'])
def test_whole_models_are_no_weights(name):
    content = {name: torch.nn.Linear(2, 1), 'epoch': 3}
    with pytest.raises(ConversionError, match='holds no weights'):
        weights_of(content)
    assert name in content_for_host(content, 'a.pth')['state_dict']


@pytest.mark.parametrize(
    ('key', 'expected'),
    [
        ('a.weight', 'a.weight'),
        ('module.a.weight', 'a.weight'),
        ('_orig_mod.a.weight', 'a.weight'),
        ('_orig_mod.module.a.weight', 'a.weight'),
        ('module._orig_mod.a.weight', 'a.weight'),
        ('a._orig_mod.b._orig_mod.weight', 'a.b.weight'),
        ('a.module.weight', 'a.module.weight'),
        ('my_orig_mod.weight', 'my_orig_mod.weight'),
    ],
)
def test_names_without_wrappers(key, expected):
    assert list(weights_of({key: torch.zeros(1)})) == [expected]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({}, 'holds no weights'),
        (dict(state_dict=3), 'its state_dict is a int'),
        (dict(state_dict=STATE, meta=[1]), 'its meta is a list'),
        (dict(state_dict={1: torch.zeros(1)}), 'is 1, not a name'),
        (dict(STATE, **{'module.a.bias': torch.zeros(1)}), 'a.bias twice'),
    ],
)
def test_strange_contents_are_named(tmp_path, content, message):
    path = tmp_path / 'odd.pth'
    torch.save(content, path)
    with pytest.raises(ConversionError, match=rf'odd.pth.*{message}'):
        read_weights(path)


def test_content_for_host_keeps_versions_and_the_file():
    """PyTorch finds by them what old versions named otherwise."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    wrapped = OrderedDict((f'module.{k}', v) for k, v in state.items())
    wrapped._metadata = OrderedDict(
        (f'module.{key}'.rstrip('.'), value)
        for key, value in state._metadata.items()
    )
    content = dict(state_dict=wrapped, meta=dict(cfg='text', epoch=1))
    ready = content_for_host(content, 'a.pth')
    assert ready['meta'] == dict(epoch=1)
    assert content['meta'] == dict(cfg='text', epoch=1)
    assert list(ready['state_dict']) == list(state)
    assert ready['state_dict']._metadata == state._metadata


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
