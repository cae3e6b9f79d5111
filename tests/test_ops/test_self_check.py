"""The self-check of the Triton kernels, on cards that are simulated."""

import dataclasses
import importlib.util
import json
import logging
import logging.handlers
import multiprocessing
import os
import queue
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lors_plugin.engine.hooks import KernelCheckHook
from lors_plugin.ops import backend, self_check
from lors_plugin.ops.self_check import (
    CacheError,
    Limits,
    SelfCheckError,
    cache,
    card,
    check,
    groups_of,
    run,
)
from lors_plugin.ops.self_check import probe as probe_module
from lors_plugin.ops.self_check.run import PROBE
from lors_plugin.ops.self_check.verdict import judge

HERE = Path(__file__).parent
CULPRIT = 'mixing float16'
QUICK = Limits(step=1, total=60, wait=0.3)


def probe(what='good'):
    # Without site-packages, which take longer to find than the rest.
    return sys.executable, '-S', str(HERE / 'fake_probe.py'), what


@pytest.fixture
def starts(monkeypatch, tmp_path):
    """Count the starts of the probe, by their groups."""
    path = tmp_path / 'starts'
    monkeypatch.setenv('FAKE_PROBE_STARTS', str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


def choose(operator, dtype=torch.float16, requested='auto', index=0):
    """The backend that a tensor on the pretended GPU would get."""
    backend._log_once.cache_clear()
    device = torch.device('cuda', index)
    tensor = SimpleNamespace(device=device, dtype=dtype)
    return backend.select_backend(requested, tensor, operator=operator)


@pytest.mark.parametrize(
    ('what', 'status', 'reason'),
    [
        ('good', 'faster', 'takes 0.50 to 0.50 of the time'),
        ('slow', 'slower', 'full at size lors takes 1.50 times as long'),
        ('wrong', 'wrong', r'gradient of x at size \w+ has .* 5.0e-01'),
        ('nan', 'wrong', 'gradient of x .* nan'),
        ('abort', 'crashed', 'SIGABRT'),
        ('segv', 'crashed', 'SIGSEGV'),
        ('raise', 'failed', 'RuntimeError: an illegal memory access'),
        ('quit', 'failed', 'ended with code 0'),
        ('hang', 'hung', 'did not end within 1 s'),
        ('print', 'faster', 'takes 0.50 to 0.50 of the time'),
        ('untimed', 'failed', 'nothing was timed'),
    ],
)
def test_what_happens_to_a_card(
    pretend_gpu, starts, caplog, what, status, reason
):
    """One group suffers, the others are judged, and 'auto' obeys."""
    here = pretend_gpu()
    verdict = check(here, 'cuda:1', probe(what), limits=QUICK)
    found = {name: g.status for name, g in verdict.groups.items()}
    assert list(found) == groups_of(here) and len(found) == 9
    assert found.pop(CULPRIT) == status
    assert set(found.values()) == {'faster'}
    assert re.search(reason, verdict.groups[CULPRIT].reason)
    dies = what in ('abort', 'segv', 'raise', 'quit', 'hang')
    assert len(starts()) == 1 + dies
    assert starts()[0].startswith('cuda:1 ')
    if dies:
        assert CULPRIT not in starts()[1]
        assert 'low_rank_mixing float16' not in starts()[1]  # was done
    wanted = 'triton' if status == 'faster' else 'torch'
    with caplog.at_level(logging.INFO, 'lors_plugin'):
        assert choose('mixing') == wanted
    (record,) = caplog.records
    assert f'{CULPRIT} on NVIDIA A100: ' in record.message
    assert verdict.date in record.message
    assert record.levelname == ('INFO' if wanted == 'triton' else 'WARNING')
    assert choose('low_rank_mixing') == 'triton'
    assert choose('sampling', torch.float32) == 'triton'
    assert choose('mixing', requested='triton') == 'triton'
    # It is known from now on.
    assert check(here, 'cuda', probe('wrong'), limits=QUICK) == verdict
    assert len(starts()) == 1 + dies


def test_two_kinds_of_cards_in_a_machine(pretend_gpu, monkeypatch):
    """Each tensor follows the verdict on the card that it is on."""
    pretend_gpu(count=2)
    names, capabilities = ('NVIDIA A100', 'Tesla T4'), ((8, 0), (7, 5))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i=0: names[i])
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda i=0: capabilities[i]
    )
    self_check.forget()
    check(card.find_card(1), 'cuda:1', probe('slow'), limits=QUICK)
    assert choose('sampling', torch.float32, index=1) == 'triton'
    # Nobody has checked the other one.
    assert choose('sampling', torch.float32, index=0) == 'torch'
    self_check.forget()
    check(card.find_card(0), 'cuda:0', probe('good'), limits=QUICK)
    assert choose('mixing', index=0) == 'triton'
    assert choose('mixing', index=1) == 'torch'


def test_a_card_below_8_0(pretend_gpu):
    here = pretend_gpu((7, 0), 'Tesla V100-SXM2-16GB')
    assert groups_of(here) == [
        'low_rank_mixing float16',
        'mixing float16',
        'sampling float32',
        'low_rank_mixing float32',
        'mixing float32',
    ]
    assert here.key.startswith('tesla-v100-sxm2-16gb-')
    check(here, 'cuda', probe(), limits=QUICK)
    assert choose('mixing', torch.float32) == 'triton'
    assert choose('mixing', torch.bfloat16) == 'torch'


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    kept, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = kept


def test_tf32_is_a_type_of_its_own(pretend_gpu, tf32):
    here = pretend_gpu()
    groups = {'mixing float32': judge([]), 'mixing tf32': judge([])}
    groups['mixing tf32'] = dataclasses.replace(judge([]), status='faster')
    cache.write(self_check.new_verdict(here, 1.0, groups))
    assert choose('mixing', torch.float32) == 'triton'
    torch.backends.cuda.matmul.allow_tf32 = False
    assert choose('mixing', torch.float32) == 'torch'
    torch.backends.cuda.matmul.allow_tf32 = True
    assert self_check.kind_of(torch.float32, 0) == 'tf32'
    pretend_gpu((7, 5))
    assert self_check.kind_of(torch.float32, 0) == 'float32'


def test_time_is_up(pretend_gpu):
    verdict = run(
        pretend_gpu(), 'cuda', probe('hang for good'), dataclasses.replace(
            QUICK, total=1.5
        )
    )  # fmt: skip
    found = [group.status for group in verdict.groups.values()]
    assert found == ['faster', *['untried'] * 8]
    assert verdict.groups[CULPRIT].reason == 'not finished, time was up'
    assert verdict.taken == {'low_rank_mixing float16'}
    assert verdict.seconds < 20


@pytest.mark.parametrize(
    ('command', 'reason'),
    [
        (probe('no start'), 'no CUDA-capable device is detected'),
        (probe('silent'), 'ended with code 0'),
        ((sys.executable, '-c', 'import os; os.abort()'), 'SIGABRT'),
        ((sys.executable, '-c', 'import time; time.sleep(60)'), 'time was up'),
    ],
)
def test_a_probe_that_does_not_come_to_a_kernel(
    pretend_gpu, caplog, command, reason
):
    here = pretend_gpu()
    total = 0.3 if 'sleep' in command[-1] else 60
    limits = dataclasses.replace(QUICK, total=total)
    with pytest.raises(SelfCheckError, match=reason):
        check(here, 'cuda', command, limits=limits)
    assert cache.read(here) is None
    assert choose('mixing') == 'torch'
    assert '`python -m lors_plugin.doctor --gpu`' in caplog.text


def test_two_versions(pretend_gpu, monkeypatch, starts):
    """A verdict is of one card and one set of versions."""
    old = pretend_gpu()
    check(old, 'cuda', probe(), limits=QUICK)
    monkeypatch.setattr(torch, '__version__', '99.1')
    new = pretend_gpu()
    assert new.torch.startswith('99.1, CUDA')
    assert choose('mixing') == 'torch'
    check(new, 'cuda', probe('slow'), limits=QUICK)
    assert len(starts()) == 2
    assert cache.read(old).groups[CULPRIT].status == 'faster'
    assert cache.read(new).groups[CULPRIT].status == 'slower'
    # A file that was moved to the name of another card.
    path = cache.directory() / f'{old.key}.json'
    path.replace(cache.directory() / f'{new.key}.json')
    assert cache.read(new) is None


def test_every_version_counts(pretend_gpu):
    here = pretend_gpu()
    keys = {here.key} | {
        dataclasses.replace(here, **{field.name: 'x'}).key
        for field in dataclasses.fields(here)
    }
    assert len(keys) == 1 + len(dataclasses.fields(here))
    assert len(card.hash_kernels()) == 16


@pytest.mark.parametrize(
    ('text', 'version'),
    [
        (
            'NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue '
            'Mar  5 22:23:56 UTC 2024\nGCC version:  gcc version 11.4.0\n',
            '550.54.15',
        ),
        (
            'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  '
            '535.104.05  Release Build\n',
            '535.104.05',
        ),
        ('nothing of the kind', 'unknown'),
    ],
)
def test_version_of_the_driver(monkeypatch, tmp_path, text, version):
    (tmp_path / 'version').write_text(text)
    monkeypatch.setattr(card, 'DRIVER_FILE', tmp_path / 'version')
    card.driver_version.cache_clear()
    assert card.driver_version() == version
    card.driver_version.cache_clear()


# --- where verdicts are kept


def test_place_and_rights(pretend_gpu, monkeypatch, tmp_path):
    here = pretend_gpu()
    check(here, 'cuda', probe(), limits=QUICK)
    folder = tmp_path / 'cache' / 'lors_plugin'
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {p.suffix: p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert modes == {'.json': 0o600, '.lock': 0o600}
    content = json.loads((folder / f'{here.key}.json').read_text())
    assert content['card']['name'] == 'NVIDIA A100'
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    assert cache.directory() == Path.home() / '.cache' / 'lors_plugin'


def spoil(how, here, monkeypatch):
    folder = cache.directory()
    path = folder / f'{here.key}.json'
    if how == 'directory of others':
        folder.chmod(0o777)
    elif how == 'directory of a group':
        folder.chmod(0o770)
    elif how == 'file of others':
        path.chmod(0o666)
    elif how == 'link':
        path.rename(folder / 'elsewhere')
        path.symlink_to(folder / 'elsewhere')
    elif how == 'linked directory':
        folder.rename(folder.with_name('elsewhere'))
        folder.symlink_to(folder.with_name('elsewhere'))
    elif how == 'another user':
        monkeypatch.setattr(os, 'geteuid', lambda: os.getuid() + 1)


@pytest.mark.parametrize(
    ('how', 'reason'),
    [
        ('directory of others', 'chmod go-w'),
        ('directory of a group', 'chmod go-w'),
        ('file of others', 'chmod go-w'),
        ('link', 'is a link'),
        ('linked directory', 'is a link'),
        ('another user', 'belongs to another user'),
    ],
)
def test_what_others_could_have_written(
    pretend_gpu, monkeypatch, caplog, starts, how, reason
):
    here = pretend_gpu()
    check(here, 'cuda', probe(), limits=QUICK)
    spoil(how, here, monkeypatch)
    with pytest.raises(CacheError, match=reason):
        cache.read(here)
    assert choose('mixing') == 'torch'
    assert 'not trusted' in caplog.text and reason in caplog.text
    with pytest.raises(CacheError, match=reason):
        check(here, 'cuda', probe(), limits=QUICK)
    assert len(starts()) == 1


@pytest.mark.parametrize(
    'text',
    ['', '{', '[]', '{"format": 99}', '{"format": 1}', '{"format": 1, '
     '"groups": {"a": {}}, "card": {}, "date": "", "seconds": 1}'],
)  # fmt: skip
def test_damaged_verdicts_are_made_anew(pretend_gpu, starts, text):
    here = pretend_gpu()
    check(here, 'cuda', probe(), limits=QUICK)
    path = cache.directory() / f'{here.key}.json'
    path.write_text(text)
    assert cache.read(here) is None
    check(here, 'cuda', probe('slow'), limits=QUICK)
    assert cache.read(here).groups[CULPRIT].status == 'slower'
    assert len(starts()) == 2


def test_no_place_to_write(pretend_gpu, monkeypatch, starts, tmp_path):
    """Nothing is run where nothing can be kept."""
    here = pretend_gpu()
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file' / 'below'))
    with pytest.raises(CacheError, match='XDG_CACHE_HOME'):
        check(here, 'cuda', probe(), limits=QUICK)
    # Root may write anywhere; the question is asked like this.
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(os, 'access', lambda *args: False)
    with pytest.raises(CacheError, match='no permission to write'):
        check(here, 'cuda', probe(), limits=QUICK)
    assert starts() == []
    assert choose('mixing') == 'torch'


# --- several processes


def in_process(here, what, results):
    try:
        verdict = check(here, 'cuda', probe(what), limits=QUICK)
        results.put(verdict.groups[CULPRIT].status)
    except SelfCheckError as error:
        results.put(str(error))


def test_two_processes_check_once(pretend_gpu, starts):
    """The second waits for the first, or gives up."""
    here, context = pretend_gpu(), multiprocessing.get_context('fork')
    results = context.SimpleQueue()
    both = [
        context.Process(
            target=in_process, args=(here, 'takes its time', results)
        )
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert [results.get(), results.get()] == ['faster', 'faster']
    assert len(starts()) == 1


def test_waiting_has_an_end(pretend_gpu, starts):
    here = pretend_gpu()
    limits = dataclasses.replace(QUICK, total=0.1, wait=0.2)
    with (
        cache.lock(here, 1),
        pytest.raises(SelfCheckError, match='another process'),
    ):
        check(here, 'cuda', probe(), limits=limits)
    assert starts() == []
    with cache.lock(here, 1):  # it was given back
        pass


def run_rank(rank, folder, verdicts, results):
    """Let a rank choose before and after it has agreed, time after time."""
    messages = logging.handlers.QueueHandler(queue.SimpleQueue())
    backend.logger.addHandler(messages)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2
    )
    for number, names in enumerate(verdicts):
        torch.cuda.get_device_name = lambda index=None: f'card {rank} {number}'  # noqa: B023
        self_check.forget()
        if names:
            groups = {n: self_check.Group('faster', 'fine') for n in names}
            here = self_check.find_card(0)
            cache.write(self_check.new_verdict(here, 1.0, groups))
        found = [choose('mixing'), self_check.agree(0)]
        results.put([*found, choose('mixing'), choose('low_rank_mixing')])
    torch.distributed.destroy_process_group()
    said = []
    while not messages.queue.empty():
        said.append(messages.queue.get().getMessage())
    results.put(said)


def test_ranks_agree(pretend_gpu, tmp_path):
    """No rank takes a kernel before that, or that another does not take.

    The last time, a rank has found no verdict in time.
    """
    pretend_gpu()
    mixing, low_rank = 'mixing float16', 'low_rank_mixing float16'
    both = {mixing, low_rank}
    verdicts = [[both, both, both], [both, {mixing}, ()]]
    context = multiprocessing.get_context('fork')
    results = [context.SimpleQueue() for _ in verdicts]
    ranks = [
        context.Process(target=run_rank, args=(rank, tmp_path, mine, result))
        for rank, (mine, result) in enumerate(zip(verdicts, results))
    ]
    for rank in ranks:
        rank.start()
    said = []
    for rank, result in zip(ranks, results):
        rank.join(60)
        assert rank.exitcode == 0
        assert [result.get() for _ in verdicts[0]] == [
            ['torch', both, 'triton', 'triton'],
            ['torch', {mixing}, 'triton', 'torch'],
            ['torch', set(), 'torch', 'torch'],
        ]
        said.append('\n'.join(result.get()))
        assert "add dict(type='lors_plugin.KernelCheckHook')" in said[-1]
    assert 'another rank does not take the kernels of low_rank' in said[0]
    assert 'have not been checked on this card 1 2' in said[1]


# --- switched off


def test_off(pretend_gpu, monkeypatch, caplog):
    check(pretend_gpu(), 'cuda', probe(), limits=QUICK)
    monkeypatch.setenv(self_check.ENV_NAME, 'off')
    assert choose('mixing') == 'torch'
    assert 'LORS_PLUGIN_SELF_CHECK=off' in caplog.text
    assert choose('mixing', requested='triton') == 'triton'
    assert self_check.agree(0) == frozenset()
    monkeypatch.setenv(self_check.ENV_NAME, 'no')
    with pytest.raises(ValueError, match="'no' must be 'off' or unset"):
        choose('mixing')


# --- the hook of train.py and test.py


class OnGpu(torch.nn.Module):
    """A model whose weights say that they are on a GPU."""

    def __init__(self, backend_name='auto', device='cuda:0'):
        super().__init__()
        self.backend, self.device = backend_name, torch.device(device)

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=self.device)


def run_hook(model):
    said = []
    logger = SimpleNamespace(info=said.append)
    KernelCheckHook().before_run(SimpleNamespace(model=model, logger=logger))
    return said


def test_hook_checks_before_a_run(pretend_gpu, monkeypatch):
    pretend_gpu()

    def simulated(card, device, say):
        return check(card, device, probe('wrong'), limits=QUICK, say=say)

    monkeypatch.setattr(self_check, 'check', simulated)
    assert choose('mixing', torch.bfloat16) == 'torch'  # not checked yet
    first, last = run_hook(OnGpu())
    assert first.startswith('Checking the Triton kernels on NVIDIA A100')
    assert last.startswith('Triton kernels run for low_rank_mixing bfloat16')
    assert CULPRIT not in last.replace('low_rank_mixing float16', '')
    assert choose('mixing', torch.bfloat16) == 'triton'
    assert choose('mixing') == 'torch'
    assert len(run_hook(OnGpu())) == 1  # known by now


def test_hook_goes_on_whatever_happens(pretend_gpu, monkeypatch):
    def simulated(card, device, say):
        return check(card, device, probe('no start'), limits=QUICK, say=say)

    monkeypatch.setattr(self_check, 'check', simulated)
    pretend_gpu()
    (said,) = run_hook(OnGpu())[1:]
    assert said.startswith('The PyTorch operators run, no Triton kernels: ')
    assert 'cannot be checked' in said
    monkeypatch.setenv(self_check.ENV_NAME, 'off')
    (said,) = run_hook(OnGpu())
    assert said.endswith('LORS_PLUGIN_SELF_CHECK=off')
    monkeypatch.delenv(self_check.ENV_NAME)
    pretend_gpu(triton=(3, 4, 0))
    (said,) = run_hook(OnGpu())
    assert 'Triton 3.4.0 is older than 3.6' in said


@pytest.mark.parametrize('model', [OnGpu('torch'), OnGpu(device='cpu')])
def test_hook_leaves_other_models_alone(pretend_gpu, model):
    pretend_gpu()
    assert run_hook(model) == []


# --- the real probe


@pytest.mark.slow
def test_a_fault_in_a_kernel_is_found(pretend_gpu, monkeypatch, caplog):
    """Real kernels, in Triton's interpreter: mixing is spoiled there."""
    pytest.importorskip('triton')
    here = pretend_gpu((7, 0))
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setenv('FAULTY_KERNEL', 'mixing')
    command = sys.executable, str(HERE / 'faulty_probe.py')
    verdict = check(here, 'cuda', command)
    monkeypatch.delenv('TRITON_INTERPRET')
    backend.device_verdict.cache_clear()
    assert importlib.util.find_spec(PROBE[-1]).origin == probe_module.__file__
    assert verdict.groups['mixing float32'].status == 'wrong'
    assert 'output at size tiny has' in verdict.groups['mixing float32'].reason
    sampling = verdict.groups['sampling float32']
    assert sampling.status == 'slower'  # in the interpreter
    assert set(sampling.sizes[0]['errors']) == {
        'output', 'gradient of table', 'gradient of points'
    }  # fmt: skip
    assert choose('mixing', torch.float32) == 'torch'
    assert 'The PyTorch operators run, not Triton: mixing' in caplog.text
