import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from lors_plugin.doctor import __main__ as doctor
from lors_plugin.doctor import gpus
from lors_plugin.doctor.checks import (
    Gpu,
    arch_supported,
    check_host,
    check_mmcv_ops,
    check_operators,
    check_python,
    check_threads,
    check_torch,
    check_triton,
    check_weights_only,
    import_remedy,
    release,
)

P100 = Gpu('Tesla P100', (6, 0))
V100 = Gpu('Tesla V100-SXM2-16GB', (7, 0))
T4 = Gpu('Tesla T4', (7, 5))
A100 = Gpu('NVIDIA A100', (8, 0))
ADA = Gpu('NVIDIA L4', (8, 9))
CUDA_13 = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120']
CUDA_128 = ['sm_70', *CUDA_13]


def statuses(found):
    return [check.status for check in found]


@pytest.mark.parametrize(
    ('version', 'status'),
    [
        ((3, 9, 1), 'missing'),
        ((3, 10, 0), 'ok'),
        ((3, 13, 2), 'ok'),
        ((3, 14, 0), 'note'),
    ],
)
def test_python(version, status):
    assert check_python(version).status == status


@pytest.mark.parametrize(
    ('capability', 'archs', 'fits'),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_128, True),
        ((8, 9), ['sm_86'], True),
        ((8, 0), ['sm_86'], False),
        ((9, 0), ['sm_90a'], True),
        ((10, 0), ['sm_86', 'compute_90'], True),
        ((7, 0), ['compute_75'], False),
        ((12, 0), CUDA_13, True),
    ],
)
def test_arch_supported(capability, archs, fits):
    assert arch_supported(capability, archs) is fits


def test_v100_with_cuda_13_is_a_trap_with_its_remedy():
    found = check_torch('2.14.1', '13.0', CUDA_13, [V100], True)
    assert statuses(found) == ['ok', 'trap']
    assert '2.8 to 2.10' in found[1].remedy
    assert 'cu126' in found[1].remedy
    assert 'no kernel image' in found[1].what


def test_v100_with_a_fitting_build_is_fine():
    found = check_torch('2.10.0', '12.8', CUDA_128, [V100], True)
    assert statuses(found) == ['ok', 'ok']


def test_each_gpu_is_judged_by_itself():
    found = check_torch('2.14.1', '13.0', CUDA_13, [V100, ADA], True)
    assert statuses(found) == ['ok', 'trap', 'ok']


def test_cpu_build_and_old_driver_beside_a_gpu():
    found = check_torch('2.13.0+cpu', None, [], [A100], False)
    assert statuses(found) == ['ok', 'trap']
    assert 'CPU build' in found[1].what
    found = check_torch('2.14.1', '13.0', CUDA_13, [A100], False)
    assert statuses(found) == ['ok', 'trap']
    assert 'driver' in found[1].remedy


def test_old_torch_is_missing():
    assert statuses(check_torch('2.3.1', None, [], [], False)) == ['missing']


def test_mmcv_operators():
    assert check_mmcv_ops(False, '', []).status == 'note'
    assert check_mmcv_ops(True, '', [A100]).status == 'ok'
    assert check_mmcv_ops(True, 'undefined symbol', []).status == 'missing'
    old = check_mmcv_ops(True, '', [V100])
    assert old.status == 'note'
    assert 'TORCH_CUDA_ARCH_LIST=7.0' in old.remedy


def test_mmdet_that_refuses_mmcv():
    error = (
        'AssertionError: MMCV==2.2.0 is used but incompatible. Please '
        'install mmcv>=2.0.0rc4, <2.2.0.'
    )
    check = check_host('mmdet', '3.3.0', ['mmdet'], error, '2.2.0')
    assert check.status == 'missing'
    assert 'mmcv 2.2.0' in check.what
    assert 'onedl-mmdetection' in check.remedy


def test_hosts_missing_old_doubled_or_broken():
    assert check_host('mmcv', None, []).status == 'missing'
    assert check_host('mmpretrain', None, []).status == 'note'
    assert check_host('mmdet', '2.28.2', ['mmdet']).status == 'missing'
    assert check_host('mmdet', '3.3.0', ['mmdet']).status == 'ok'
    both = check_host('mmcv', '2.3.6', ['onedl-mmcv', 'mmcv'])
    assert both.status == 'trap'
    broken = check_host('mmcv', '2.1.0', ['mmcv'], 'ImportError: libGL.so.1')
    assert broken.status == 'missing'
    assert 'headless' in broken.remedy


def test_import_remedy_knows_the_missing_extension():
    assert 'lors_plugin' in import_remedy("No module named 'mmcv._ext'")


@pytest.mark.parametrize(
    ('version', 'error', 'named'),
    [
        ('5.0.0', TypeError('NoneType takes no arguments'), True),
        ('6.1.dev0', TypeError('NoneType takes no arguments'), True),
        ('4.57.6', TypeError('NoneType takes no arguments'), False),
        ('5.0.0', TypeError('no such option'), False),
        (None, TypeError('NoneType takes no arguments'), False),
    ],
)
def test_transformers_5(monkeypatch, version, error, named):
    """MMPretrain cannot be imported beside it, nor any detector."""

    def installed(name):
        if name != 'transformers' or version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    def fails(name):
        raise error

    monkeypatch.setattr(metadata, 'version', installed)
    monkeypatch.setattr(importlib, 'import_module', fails)
    text = doctor.try_import('mmdet.models')
    assert ('does not work with transformers' in text) is named
    check = check_host('mmdet', '3.5.1', ['mmdet'], text)
    assert ('transformers>=4.57,<5' in check.remedy) is named
    assert check.status == 'missing'


@pytest.mark.parametrize(
    ('torch_version', 'handled', 'status'),
    [
        ('2.5.1', False, 'ok'),
        ('2.6.0', False, 'trap'),
        ('2.14.1+cu126', False, 'trap'),
        ('2.14.1', True, 'ok'),
    ],
)
def test_weights_only(torch_version, handled, status):
    check = check_weights_only(torch_version, handled)
    assert check.status == status
    assert ('register_safe_globals' in check.remedy) == (status == 'trap')


@pytest.mark.parametrize(
    ('version', 'word'),
    [
        ('3.6.0', 'spill'),
        ('3.8.0', 'spill'),
    ],
)
def test_triton_on_a_v100(version, word):
    (check,) = check_triton(version, None, [V100], False)
    assert check.status == 'note'
    assert word in check.what
    assert 'float32' in check.remedy


def test_triton_elsewhere():
    assert statuses(check_triton(None, '2.14.1', [A100], False)) == ['note']
    assert statuses(check_triton('3.8.0', '2.14.1', [A100], False)) == ['ok']
    assert statuses(check_triton('3.8.0', '2.14.1', [A100], True)) == ['trap']
    (check,) = check_triton('3.8.0', '2.14.1', [], False)
    assert 'TRITON_INTERPRET=1' in check.what
    check = check_triton('3.5.1', '2.14.1', [], False)[-1]
    assert check.what.endswith('since kernels need 3.6')
    found = check_triton('3.2.0', '2.14.1', [T4, A100], False)
    assert statuses(found) == ['note', 'note', 'note']
    assert 'not the one' in found[0].what
    for check in found[1:]:
        assert 'not used, the PyTorch operators run' in check.what
        assert 'since kernels need 3.6' in check.what
    found = check_triton('3.7.1', '2.13.0', [P100, A100], False)
    assert statuses(found) == ['note', 'ok']
    assert 'sm_60: not used' in found[0].what
    assert 'kernels compile' in found[1].what
    assert len(check_triton('3.8.0', '2.13.0', [A100], False)) == 2


def test_triton_is_judged_as_the_operators_judge_it():
    from lors_plugin.ops import backend

    for version in ((3, 2, 0), (3, 3, 0), (3, 6, 1), (3, 8, 0)):
        for gpu in (P100, V100, T4, A100):
            used, _ = backend.triton_verdict(
                'cuda', backend.torch.float32, version, gpu.capability
            )
            text = '.'.join(map(str, version))
            (check,) = check_triton(text, None, [gpu], False)
            assert used == ('not used' not in check.what)


YES, NO = (True, ''), (False, 'no such type')


@pytest.mark.parametrize(
    ('verdicts', 'variable', 'status', 'text'),
    [
        (dict(a=YES, b=YES), '', 'ok', 'on X: triton where checked for a, b'),
        (dict(a=YES, b=NO), '', 'ok', 'for a; torch for b (no such'),
        (dict(a=NO, b=NO), 'auto', 'ok', 'torch for a, b (no such type)'),
        (dict(a=(False, 'x'), b=NO), '', 'ok', '(a: x; b: no such type)'),
        (dict(a=YES), 'reference', 'note', 'on X: reference, as LORS'),
        (dict(a=YES), 'triton', 'ok', 'triton for a'),
        (dict(a=YES, b=NO), 'triton', 'trap', 'fails on X (no such type)'),
        (dict(a=YES), 'fast', 'trap', '=fast names no backend'),
    ],
)
def test_operators(verdicts, variable, status, text):
    check = check_operators('X', verdicts, variable)
    assert check.status == status
    assert text in check.what
    assert bool(check.remedy) == (status == 'trap')


def test_operators_of_a_v100(monkeypatch, pretend_gpu):
    """The verdict that the operators themselves act on."""
    pretend_gpu((7, 0), 'V100', triton=(3, 6), count=2)
    monkeypatch.setattr(doctor, 'find_gpus', lambda: [V100, V100, A100])
    old, new, checked = doctor.look_at_operators()
    assert 'torch for bfloat16 (compute capability 7.0' in old.what
    assert new.what.endswith('where checked for float32, float16, bfloat16')
    assert checked.status == 'note'
    assert 'have not been checked on this V100' in checked.what
    assert checked.remedy == 'python -m lors_plugin.doctor --gpu'


@pytest.mark.parametrize(
    ('status', 'text'),
    [
        ('faster', 'Triton runs for mixing float16, PyTorch for the rest'),
        ('crashed', 'the PyTorch operators run'),
    ],
)
def test_verdict_of_the_self_check(pretend_gpu, monkeypatch, status, text):
    from lors_plugin.ops import self_check

    card = pretend_gpu()
    groups = {'mixing float16': self_check.Group(status, 'so it is')}
    self_check.cache.write(self_check.new_verdict(card, 1.0, groups))
    (check,) = gpus.look_at_verdicts()
    assert (check.status, check.what.endswith(text)) == ('ok', True)
    monkeypatch.setenv('LORS_PLUGIN_SELF_CHECK', 'off')
    (check,) = gpus.look_at_verdicts()
    assert check.what.endswith('LORS_PLUGIN_SELF_CHECK=off')
    monkeypatch.delenv('LORS_PLUGIN_SELF_CHECK')
    self_check.cache.directory().chmod(0o777)
    self_check.forget()
    (check,) = gpus.look_at_verdicts()
    assert check.status == 'trap' and 'chmod go-w' in check.what


PROBE = Path(__file__).parents[1] / 'test_ops' / 'fake_probe.py'


def check_gpus(what):
    text = []
    code = gpus.check_gpus(text.append, (sys.executable, str(PROBE), what))
    return code, ''.join(text)


def test_gpu_check(pretend_gpu):
    """The table, the reasons, and what it means; each kind of card once."""
    pretend_gpu(count=2)
    code, text = check_gpus('wrong')
    assert code == 0
    assert text.count('NVIDIA A100 (compute capability 8.0), driver') == 1
    lines = [re.split('  +', line) for line in text.splitlines()]
    rows = {name: cells for name, *cells in lines if len(cells) == 9}
    assert rows.pop('kernels')[0] == 'verdict' and len(rows) == 9
    ms = ['0.500', '1.000', '1.000', '2.000', '800', '1500']
    assert rows['mixing bfloat16'] == ['faster', '1.0e-07', '1.0e-05', *ms]
    assert rows['mixing float16'] == ['wrong', '5.0e-01', '1.0e-03', *ms]
    assert 'mixing float16: wrong, gradient of x at size odd has' in text
    assert "backend='triton'" in text and 'open an issue' in text
    # Asked for again, it is done again.
    assert 'mixing float16: right, but full' in check_gpus('slow')[1]
    (check,) = gpus.look_at_verdicts()
    assert 'mixing bfloat16' in check.what


def test_gpu_check_that_cannot_run_or_be_kept(pretend_gpu, monkeypatch):
    pretend_gpu()
    code, text = check_gpus('no start')
    assert code == 1
    assert 'error: the kernels cannot be checked: RuntimeError' in text
    monkeypatch.setenv('XDG_CACHE_HOME', str(PROBE))
    code, text = check_gpus('good')
    assert code == 1 and 'mixing float16: right' in text
    assert "'auto' will not know of this: verdicts of the self" in text
    monkeypatch.undo()
    pretend_gpu(triton=(3, 2, 0))
    code, text = check_gpus('good')
    assert code == 0 and 'Triton 3.2.0 is older than 3.6' in text


def test_gpu_check_without_a_gpu(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert doctor.main(['--gpu']) == 1
    assert 'PyTorch sees no GPU' in capsys.readouterr().out


def test_operators_of_this_machine(monkeypatch):
    import torch

    monkeypatch.delenv('LORS_PLUGIN_BACKEND', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    check, compiled, threads = doctor.look_at_operators()
    assert compiled == doctor.look_at_compiled()
    assert threads.status in ('ok', 'note')
    assert check.what.startswith('operators on the CPU: torch for all types')
    monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'triton')
    assert statuses(doctor.look_at_operators())[0] == 'trap'


def test_compiled_code(monkeypatch):
    from lors_plugin.ops import cpu_library

    def look(variable, found):
        monkeypatch.setenv('LORS_PLUGIN_CPU_KERNELS', variable)
        monkeypatch.setattr(cpu_library, 'find_sets', lambda: found)
        return doctor.look_at_compiled()

    wide, narrow = SimpleNamespace(name='AVX2'), SimpleNamespace(name='SSE')
    wide.runs, narrow.runs = False, True
    found = [wide, narrow]
    assert look('', found) == doctor.Check(
        'ok', 'mixing on the CPU is compiled: SSE'
    )
    assert look('off', found).what.endswith('KERNELS=off')
    assert look('avx2', found).status == 'trap'
    missing = look('', 'no file')
    assert missing.status == 'note' and missing.what.endswith('no file')
    assert 'apt install g++' in missing.remedy
    assert look('sse', 'no file').status == 'trap'


@pytest.mark.parametrize(
    ('policy', 'spins', 'threads', 'status'),
    [('', '', 1, 'ok'), ('', '', 2, 'note'), ('ACTIVE', '', 2, 'note')]
    + [('PASSIVE', '', 2, 'ok'), ('passive', '', 8, 'ok')]
    + [('', '10000', 2, 'ok')],
)
def test_threads(policy, spins, threads, status):
    found = check_threads(policy, spins, threads)
    assert found.status == status
    assert ('OMP_WAIT_POLICY' in found.remedy) == (status == 'note')


def test_release():
    assert release('2.14.1+cu126') == (2, 14, 1)
    assert release('2.0.0rc4') == (2, 0, 0)
    assert release(None) == ()


def test_parse_gpus():
    text = 'Tesla V100-SXM2-16GB, 7.0\nNVIDIA L4, 8.9\n\n'
    assert doctor.parse_gpus(text) == [V100, ADA]


def test_a_section_that_fails_does_not_end_the_report(monkeypatch, capsys):
    def fails():
        raise RuntimeError('boom')

    monkeypatch.setattr(doctor, 'SECTIONS', {'A': fails, 'B': fails})
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.count('boom') == 2


@pytest.mark.parametrize('name', ['scipy.optimize', 'pycocotools.mask'])
def test_a_missing_need_gives_exit_code_1(monkeypatch, capsys, name):
    real = doctor.try_import

    def fake(module):
        if module == name:
            return f'ModuleNotFoundError: {name}'
        return '' if module == 'lors_plugin.models' else real(module)

    monkeypatch.setattr(doctor, 'try_import', fake)
    monkeypatch.setattr(
        doctor, 'SECTIONS', {'Packages': doctor.look_at_packages}
    )
    assert doctor.main([]) == 1
    assert f'missing  {name}' in capsys.readouterr().out


def test_torch_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, 'try_import', lambda name: 'ImportError: x')
    found = doctor.look_at_torch()
    assert statuses(found) == ['ok', 'missing']


def test_as_a_command(quick_python):
    done = subprocess.run(
        [quick_python, '-m', 'lors_plugin.doctor'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int('\n  missing' in done.stdout), done.stderr
    for word in ('torch', 'mmdet', 'Triton', 'torchvision'):
        assert word in done.stdout
    assert 'this check failed' not in done.stdout
