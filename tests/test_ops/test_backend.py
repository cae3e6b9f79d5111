"""The choice of an implementation."""

import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lors_plugin import ops
from lors_plugin.ops import backend, cpu_library, self_check
from lors_plugin.ops.adaptive_mixing import LowRank, _too_large
from lors_plugin.ops.backend import ENV_NAME, select_backend, triton_verdict

FLOAT, HALF, BRAIN, DOUBLE = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64
)  # fmt: skip
X = torch.zeros(1)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable set and nothing remembered."""
    monkeypatch.delenv(ENV_NAME, raising=False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)

    def forget():
        for function in (backend.device_verdict, backend._log_once):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def machine(pretend_gpu):
    """Pretend that there is a GPU; choose as for a tensor on it."""

    def make(capability, version=(3, 8, 0), status='faster'):
        card = pretend_gpu(capability, triton=version)
        groups = {
            name: self_check.Group(status, 'as a test says')
            for name in self_check.groups_of(card)
        }
        self_check.cache.write(self_check.new_verdict(card, 1.0, groups))
        gpu = torch.device('cuda', 0)
        return lambda requested, dtype=FLOAT, refusal='': select_backend(
            requested, SimpleNamespace(device=gpu, dtype=dtype), refusal
        )

    return make


@pytest.mark.parametrize(
    ('requested', 'variable', 'wanted'),
    [
        ('auto', None, 'torch'),
        ('auto', '', 'torch'),
        ('auto', 'auto', 'torch'),
        ('auto', 'reference', 'reference'),
        ('auto', 'torch', 'torch'),
        ('torch', 'reference', 'torch'),
        ('reference', 'torch', 'reference'),
    ],
)
def test_request_beats_variable(monkeypatch, requested, variable, wanted):
    if variable is not None:
        monkeypatch.setenv(ENV_NAME, variable)
    assert select_backend(requested, X) == wanted


def test_unknown_request_names_the_argument():
    with pytest.raises(ValueError, match="backend='fast' is no backend"):
        select_backend('fast', X)
    # Of an operator without C++ code.
    with pytest.raises(ValueError, match="backend='cpu' is no backend"):
        select_backend('cpu', X)


@pytest.mark.parametrize(
    ('requested', 'tensor', 'cpu_refusal', 'wanted'),
    [
        ('auto', X, '', 'cpu'),
        ('auto', X, None, 'torch'),
        ('auto', X, 'too large', 'torch'),
        ('auto', X.double(), '', 'torch'),
        ('auto', X.bfloat16(), '', 'torch'),
        ('auto', X.to('meta'), '', 'torch'),
        ('torch', X, '', 'torch'),
        ('reference', X, '', 'reference'),
        ('cpu', X, '', 'cpu'),
        ('cpu', X, 'too large', "backend='cpu' cannot.*too large"),
        ('cpu', X.double(), '', 'takes float32 on the CPU.*torch.float64'),
        ('cpu', X.to('meta'), '', 'takes float32 on the CPU.*on meta'),
    ],
)
def test_operators_with_cpp_code(requested, tensor, cpu_refusal, wanted):
    if isinstance(cpu_library.find_sets(), str):
        pytest.skip(cpu_library.find_sets())
    if wanted in ('cpu', 'torch', 'reference'):
        chosen = select_backend(requested, tensor, cpu_refusal=cpu_refusal)
        assert chosen == wanted
    else:
        with pytest.raises(RuntimeError, match=wanted):
            select_backend(requested, tensor, cpu_refusal=cpu_refusal)


def test_unknown_variable_names_the_variable(monkeypatch):
    monkeypatch.setenv(ENV_NAME, 'fast')
    with pytest.raises(ValueError, match=f"{ENV_NAME}='fast' is no backend"):
        select_backend('auto', X)
    assert select_backend('torch', X) == 'torch'


def test_triton_on_a_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, 'triton_version', lambda: (3, 8))
    with pytest.raises(RuntimeError, match="backend='triton'.*is on cpu"):
        select_backend('triton', X)
    monkeypatch.setenv(ENV_NAME, 'triton')
    with pytest.raises(RuntimeError, match=f"{ENV_NAME}='triton'.*on cpu"):
        select_backend('auto', X)


@pytest.mark.parametrize('dtype', [FLOAT, HALF, BRAIN])
def test_auto_takes_triton_on_a_gpu(machine, caplog, dtype):
    choose = machine((8, 0))
    assert choose('auto', dtype) == 'triton'
    assert choose('torch', dtype) == 'torch'
    assert not caplog.records


@pytest.mark.parametrize('status', ['slower', 'wrong', 'crashed', 'untried'])
def test_auto_obeys_the_self_check_and_an_order_does_not(
    machine, caplog, status
):
    choose = machine((8, 0), status=status)
    assert choose('auto', HALF) == choose('auto', HALF) == 'torch'
    (record,) = caplog.records
    assert 'mixing float16 on NVIDIA A100: as a test says' in record.message
    assert choose('triton', HALF) == 'triton'


def test_auto_falls_back_and_says_why_once(machine, caplog):
    choose = machine((7, 0))
    with caplog.at_level(logging.WARNING, 'lors_plugin'):
        for _ in range(3):
            assert choose('auto', BRAIN) == 'torch'
            assert choose('auto', HALF) == 'triton'
    (record,) = caplog.records
    assert 'no bfloat16' in record.getMessage()
    with pytest.raises(RuntimeError, match='no bfloat16; use float16'):
        choose('triton', BRAIN)


def test_sizes_that_the_kernels_cannot_take(machine, caplog):
    choose = machine((8, 0))
    assert choose('auto', HALF, 'too large') == 'torch'
    assert 'too large' in caplog.text
    assert choose('torch', HALF, 'too large') == 'torch'
    with pytest.raises(RuntimeError, match='too large'):
        choose('triton', HALF, 'too large')


@pytest.mark.parametrize(
    ('points', 'width', 'out_points', 'groups', 'rank', 'fits'),
    [
        (64, 128, 128, 3, 16, True),
        (64, 128, 128, 3, 32, True),
        (64, 128, 128, 8, 16, True),
        (64, 128, 128, 3, 43, False),
        (64, 128, 128, 3, 64, False),
        (32, 64, 128, 0, 1, True),
        (32, 64, 256, 0, 1, True),
        (32, 64, 257, 0, 1, False),
        (64, 129, 128, 0, 1, False),
        (16, 8, 1024, 0, 1, True),
        (16, 8, 2048, 0, 1, False),
    ],
)
@pytest.mark.parametrize('side', [0, 1])
def test_sizes_of_tiles(points, width, out_points, groups, rank, fits, side):
    numbers = width**2 + out_points * points
    cuda = SimpleNamespace(type='cuda')
    x = SimpleNamespace(device=cuda, shape=(1, 1, 1, points, width))
    weights = SimpleNamespace(shape=(1, 1, 1, numbers))
    core = SimpleNamespace(shape=(1, 1, 1, groups, rank, rank))
    parts = [None, None]
    if groups:
        parts[side] = LowRank(None, core, None)
    refusal = _too_large(x, weights, *parts)
    assert (refusal == '') == fits
    assert fits or not groups or f'K r {groups * rank}' in refusal
    if importlib.util.find_spec('triton'):
        from lors_plugin.ops.adaptive_mixing.triton import launch

        size = dict(G=1, P=points, C=width, Q=out_points)
        for i, name in enumerate('CS'):
            here = parts[i] is not None
            size[f'K{name}'] = groups if here else 0
            size[f'R{name}'] = rank if here else 1
        config = functools.partial(launch.config, size, HALF, 80, 'forward')
        if fits:
            config()
        else:
            with pytest.raises(ValueError, match="backend='torch'"):
                config()


def test_auto_leaves_the_interpreter_alone(machine, monkeypatch, caplog):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    choose = machine((8, 0))
    assert choose('auto') == 'torch'
    assert 'TRITON_INTERPRET=1' in caplog.text
    assert choose('triton') == 'triton'
    assert select_backend('auto', X) == 'torch'
    assert select_backend('triton', X) == 'triton'


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({}, ''),
        (dict(dtype=HALF), ''),
        (dict(dtype=BRAIN), ''),
        (dict(dtype=DOUBLE), 'not torch.float64'),
        (dict(dtype=torch.int32), 'not torch.int32'),
        (dict(version=None), 'not installed'),
        (dict(version=(3, 1, 0)), '3.1.0 is older than 3.6'),
        (dict(version=(2, 9)), '2.9 is older than 3.6'),
        (dict(version=(3, 2, 1)), '3.2.1 is older than 3.6'),
        (dict(version=(3, 6, 0)), ''),
        (dict(version=(4, 0)), ''),
        (dict(capability=(7, 0)), ''),
        (dict(capability=(7, 5), dtype=HALF), ''),
        (dict(capability=(7, 0), dtype=HALF, version=(3, 6)), ''),
        (dict(capability=(7, 0), dtype=BRAIN), '7.0 has no bfloat16'),
        (dict(capability=(6, 1)), '6.1, Triton needs 7.0'),
        (dict(capability=(12, 0), dtype=BRAIN), ''),
        (dict(capability=None), 'unknown'),
        (dict(rocm=True), 'AMD'),
        (dict(kind='cpu'), 'is on cpu'),
        (dict(kind='mps'), 'is on mps'),
        (dict(kind='cpu', interpret=True), ''),
        (dict(kind='cpu', interpret=True, dtype=HALF), ''),
        (dict(interpret=True, dtype=BRAIN), 'wrong in bfloat16'),
        (dict(interpret=True, dtype=DOUBLE), 'not torch.float64'),
        (dict(interpret=True, version=None), 'not installed'),
    ],
)
def test_verdict(change, reason):
    facts = dict(
        kind='cuda', dtype=FLOAT, version=(3, 8, 0), capability=(8, 0)
    )
    possible, said = triton_verdict(**{**facts, **change})
    assert possible == (not reason)
    assert reason in said
    assert bool(said) == bool(reason)


def test_version_of_triton():
    version = backend.triton_version()
    try:
        import triton
    except ImportError:
        assert version is None
    else:
        assert triton.__version__.startswith('.'.join(map(str, version)))


@pytest.mark.parametrize('requested', ['auto', 'reference'])
def test_inside_a_compiled_function(monkeypatch, caplog, requested):
    """No graph break: neither by the variable, nor the log, nor a cache."""
    no = functools.cache(lambda kind, index, dtype: (False, 'not today'))
    monkeypatch.setattr(backend, 'device_verdict', no)

    def scale(x):
        name = backend._choose(requested, 'cuda', 0, x.dtype, '')
        same = name == select_backend(requested, x)
        return x * (2 if name == 'torch' else 3) + same

    run = torch.compile(scale, fullgraph=True, backend='eager')
    wanted = 3 if requested == 'auto' else 4
    assert run(torch.ones(3)).tolist() == [wanted] * 3
    assert ('not today' in caplog.text) == (requested == 'auto')


@pytest.mark.parametrize('name', ['adaptive_mixing', 'sampling_3d'])
def test_variable_reaches_the_operator(monkeypatch, name):
    """'reference' must not pass through the registered operator."""
    called = []
    module = sys.modules[getattr(ops, name).__module__]
    reference = getattr(module, f'{name}_reference')

    def spy(*args):
        called.append('reference')
        return reference(*args)

    monkeypatch.setattr(module, f'{name}_reference', spy)
    inputs = [torch.rand(1, 1, 1, 2, 2), torch.rand(1, 1, 1, 8)]
    if name == 'sampling_3d':
        feats = [torch.rand(1, 2, 3, 3)]
        # Without gradients, a single pass is the reference's.
        points = torch.rand(1, 1, 1, 2, 3, requires_grad=True)
        inputs = [feats, points, [4]]
    results = []
    for variable in ('reference', 'torch'):
        monkeypatch.setenv(ENV_NAME, variable)
        results.append(getattr(ops, name)(*inputs))
        called.append(variable)
    assert called == ['reference', 'reference', 'torch']
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="backend='fast' is no backend"):
        getattr(ops, name)(*inputs, backend='fast')


def test_import_asks_nobody():
    """Nothing but PyTorch is imported, and no driver is woken up."""
    code = (
        'import sys, torch\n'
        'def no(*args): raise AssertionError("asked the driver")\n'
        'torch.cuda._lazy_init = torch.cuda.is_available = no\n'
        'torch.cuda.get_device_capability = no\n'
        'import lors_plugin.ops\n'
        'from lors_plugin.ops.backend import select_backend\n'
        'assert select_backend("auto", torch.zeros(1)) == "torch"\n'
        'heavy = ("triton", "torch._dynamo", "mmengine", "mmcv", "mmdet")\n'
        'print(*[name for name in heavy if name in sys.modules])\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != ENV_NAME},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_large_buffers_of_any_type():
    like, shape = torch.zeros(1), (2**23 + 3, 3)
    for dtype in (None, torch.int16):
        out = backend.new_large(like, shape, dtype)
        assert out.shape == shape and out.dtype == (dtype or torch.float32)
        assert (out.fill_(3) == 3).all()
    assert backend.new_large(like, (3, 2)).shape == (3, 2)
    assert backend.new_large(like.to('meta'), shape).is_meta
    with FakeTensorMode() as mode:
        assert backend.new_large(mode.from_tensor(like), shape).shape == shape


def flags_at(address):
    """Linux's flags of the mapping that holds an address."""
    inside = False
    with open('/proc/self/smaps', encoding='utf-8') as file:
        for line in file:
            if match := re.match('([0-9a-f]+)-([0-9a-f]+) ', line):
                start, stop = (int(side, 16) for side in match.groups())
                inside = start <= address < stop
            elif inside and line.startswith('VmFlags:'):
                return line.split()[1:]
    return []


@pytest.mark.skipif(sys.platform != 'linux', reason='flags of Linux')
def test_large_buffers_ask_for_huge_pages():
    middle = 2**26
    plain = torch.empty(2**27, dtype=torch.uint8)
    if not flags_at(plain.data_ptr() + middle):
        pytest.skip('this kernel does not tell the flags')
    large = backend.new_large(torch.zeros(1), (2**27,), torch.uint8)
    assert 'hg' in flags_at(large.data_ptr() + middle)
