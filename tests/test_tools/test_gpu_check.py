"""tools/gpu_check.sh: parts, limits, reports, and what stops it."""

import csv
import json
import os
import re
import signal
import subprocess
import zipfile
from pathlib import Path

import gpu_check
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def signals():
    """Handlers as they were, afterwards."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def shell(text):
    return ['sh', '-c', text]


def read(folder):
    text = (folder / 'report.md').read_text()
    return text, json.loads((folder / 'report.json').read_text())


def benchmark(folder, ratio=0.5):
    """Write what a benchmark would have."""
    folder.mkdir()
    row = dict(case='mixing', size='lors', implementation='torch')
    row |= dict(dtype='float16', mode='full', metric='time', unit='ms')
    row |= dict(median=2.0, p20=1.0, p80=3.0, fastest=1.0, repeats=3)
    with (folder / 'benchmarks.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, [*row, 'ratio'])
        writer.writeheader()
        writer.writerow(dict(row, ratio=ratio))


def test_parts_one_after_the_other(tmp_path):
    """One fails, one is late, and both leave the rest alone."""
    benchmark(tmp_path / 'mixing')
    tests = 'tests/a.py::test_x[a b] PASSED [ 50%]\n'
    tests += 'tests/a.py::test_y FAILED [ 99%]\ntests/a.py::test_z '
    parts = [
        gpu_check.Part('doctor', shell('echo all is well')),
        gpu_check.Part('tests', shell(f'printf "%s" "{tests}"; exit 3')),
        gpu_check.Part('self-check', shell('echo begun; sleep 60'), 0.01),
        gpu_check.Part('mixing', shell('true')),
    ]
    assert gpu_check.run_parts(parts, tmp_path, 1, gpu_check.Stop()) == 1
    text, content = read(tmp_path)
    found = {part['name']: part['status'] for part in content['parts']}
    assert found == dict(doctor='ok', tests='failed (3)', mixing='ok') | {
        'self-check': 'time was up'
    }
    assert content['tests'] == dict(
        passed=['tests/a.py::test_x[a b]'], failed=['tests/a.py::test_y']
    )
    assert '1 passed, 1 failed\n- tests/a.py::test_y' in text
    assert 'all is well' in text and 'begun' in text
    assert '## mixing: lors' in text and '0.50x' in text
    assert 'its ratio to the row of 1.00x' in text
    assert content['benchmarks'][0]['median'] == 2.0
    assert '![mixing](mixing.png)' in text
    assert (tmp_path / 'mixing.png').stat().st_size > 5000


def test_no_time_left(tmp_path):
    parts = [gpu_check.Part(name, shell('sleep 60')) for name in 'ab']
    assert gpu_check.run_parts(parts, tmp_path, 0.01, gpu_check.Stop()) == 0
    found = [part['status'] for part in read(tmp_path)[1]['parts']]
    assert found == ['time was up', 'not run']


@pytest.mark.parametrize(
    ('number', 'code'), [('INT', 130), ('TERM', 143)]
)  # fmt: skip
def test_what_was_found_is_kept_when_it_is_stopped(
    monkeypatch, signals, capsys, tmp_path, number, code
):
    """The part is asked to stop as well, and writes its results."""
    out = tmp_path / 'out'
    trap = f'trap "echo saved > {tmp_path}/saved; exit 1" INT'
    stop = shell(f'{trap}; kill -{number} $PPID; while :; do sleep 0.1; done')
    parts = [
        gpu_check.Part('doctor', shell('echo all is well')),
        gpu_check.Part('mixing', stop),
        gpu_check.Part('tests', shell('true')),
    ]
    monkeypatch.setattr(gpu_check, 'make_parts', lambda *_: parts)
    argv = ['--device', 'cpu', '--output', str(out)]
    assert gpu_check.main(argv) == code
    text, content = read(out)
    found = [part['status'] for part in content['parts']]
    assert found == ['ok', 'stopped', 'not run']
    assert 'all is well' in text
    assert (tmp_path / 'saved').read_text() == 'saved\n'
    assert f'attach\n{out}.zip' in capsys.readouterr().out
    with zipfile.ZipFile(f'{out}.zip') as archive:
        assert {'out/report.md', 'out/doctor.log'} <= {*archive.namelist()}


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--minutes', '0'], '--minutes 0 must be positive'),
        (['--only', 'mixin'], "no part 'mixin'; there are doctor, self-check"),
        (['--output', str(ROOT)], 'exists and is not empty'),
    ],
)
def test_mistakes_in_the_command(capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        gpu_check.parse_args(['--device', 'cpu', *argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse_args([])
    assert 'PyTorch sees no GPU' in capsys.readouterr().err


def test_what_it_does_on_a_gpu(tmp_path):
    """Doctor, check and tests first; shares leave time for each."""
    parts = gpu_check.make_parts('cuda', tmp_path)
    names = [part.name for part in parts]
    assert names == [
        'doctor', 'self-check', 'tests', 'mixing', 'sampling', 'decoder',
        'detector', 'decoder-300-queries', 'parameternet', 'vit-adapters',
    ]  # fmt: skip
    assert sum(part.share for part in parts[:3]) < 1
    assert parts[1].command[1:] == ['-m', 'lors_plugin.doctor', '--gpu']
    assert not any('--quick' in part.command for part in parts)
    for part in parts[3:]:
        assert part.command[-1] == str(tmp_path / part.name)


@pytest.mark.slow
def test_the_command_on_a_cpu(quick_python, tmp_path):
    """From the shell, with an interpreter that has everything."""
    out = tmp_path / 'out'
    done = subprocess.run(
        [
            *('bash', str(ROOT / 'tools' / 'gpu_check.sh')),
            *('--device', 'cpu', '--minutes', '5', '--output', str(out)),
            *('--only', 'self-check'),
        ],
        env=dict(os.environ, PYTHON=quick_python),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f'{out}.zip'
    text, content = read(out)
    assert '| self-check | ok |' in text
    assert 'the figures mean nothing' in text
    *_, last = (out / 'self-check.log').read_text().splitlines()
    (size,) = json.loads(last)['sampling float32']
    assert size['size'] == 'tiny' and len(size['errors']) == 3


def test_wheels_that_are_not_there(tmp_path):
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / 'gpu_check.sh'), '--wheels', 'nowhere'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == 'error: --wheels nowhere is no folder\n'


def test_the_folder_of_wheels_has_what_is_installed():
    """The page asks for the extras that the script installs."""
    page = (ROOT / 'docs/en/benchmarks/gpu.md').read_text()
    script = (ROOT / 'tools' / 'gpu_check.sh').read_text()
    (wheels,) = re.findall(r"pip wheel .*'\.\[(.+)\]'", page)
    (installed,) = re.findall('setup_env (.+)', script)
    assert wheels.split(',') == installed.split()


FAKE = """#!/bin/sh
# An interpreter that has torch, belongs to no environment, and lacks the rest.
case "$*" in
    *find_spec*' torch') exit 0 ;;
    *find_spec*) exit 1 ;;
    *base_prefix*) exit 0 ;;
    '-m venv'*)
        printf '%s\\n' "venv: $*" "$PIP_NO_INDEX $PIP_FIND_LINKS"
        exit 9
        ;;
esac
exit 1
"""


def test_the_pytorch_of_the_machine_is_kept(tmp_path):
    """The rest comes from the wheels, into an environment that sees it."""
    for name in ('tools', 'wheels'):
        (tmp_path / name).mkdir()
    script = tmp_path / 'tools' / 'gpu_check.sh'
    script.write_text((ROOT / 'tools' / 'gpu_check.sh').read_text())
    python = tmp_path / 'python3'
    python.write_text(FAKE)
    python.chmod(0o755)
    done = subprocess.run(
        ['bash', str(script), '--wheels', 'wheels'],
        env=dict(PATH=f'{tmp_path}:/usr/bin:/bin'),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr
    assert done.stdout.splitlines() == [
        f'venv: -m venv --system-site-packages {tmp_path}/.venv',
        f'1 {tmp_path}/wheels',
    ]
