"""The shell launchers, with a fake ``srun`` and a fake Python.

Real processes are started in ``tests/test_training.py``.
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
ECHO = '#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n'


def run(script, *args, cwd=None, **env):
    """Run a launcher and return the finished process."""
    drop = ('PORT', 'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'OMP_NUM_THREADS')
    drop += ('MASTER_PORT', 'SLURM_JOB_ID')
    clean = {k: v for k, v in os.environ.items() if k not in drop}
    clean['PYTHON'] = sys.executable
    return subprocess.run(
        ['bash', str(TOOLS / script), *map(str, args)],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def fake(path, text=ECHO):
    """Write an executable that prints its arguments, a line each."""
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ('script', 'args'),
    [
        ('dist_train.sh', []),
        ('dist_train.sh', ['config.py']),
        ('dist_train.sh', ['config.py', '--resume']),
        ('dist_train.sh', ['config.py', '0']),
        ('dist_test.sh', ['config.py', '2']),
        ('dist_test.sh', ['config.py', 'a.pth', 'two']),
        ('slurm_train.sh', ['part', 'job', 'config.py']),
        ('slurm_test.sh', ['part', 'job', 'config.py']),
    ],
)
def test_wrong_arguments_show_the_usage(script, args):
    done = run(script, *args)
    assert done.returncode == 2
    assert done.stderr.startswith(f'Usage: bash tools/{script} ')
    assert done.stdout == ''


@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_slurm(tmp_path, script):
    fake(tmp_path / 'srun')
    done = run(
        script, 'part', 'job', 'config.py', 'here', '--cfg-options', 'a=b c',
        GPUS='16', CPUS_PER_TASK='3', SRUN_ARGS='--quota=x -w node1',
        PYTHON='python', PATH=f'{tmp_path}:{os.environ["PATH"]}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tool = script.replace('slurm_', '').replace('.sh', '.py')
    place = ['--work-dir', 'here'] if tool == 'train.py' else ['here']
    assert done.stdout.splitlines() == [
        '-p', 'part', '--job-name=job', '--gres=gpu:8', '--ntasks=16',
        '--ntasks-per-node=8', '--cpus-per-task=3', '--kill-on-bad-exit=1',
        '--quota=x', '-w', 'node1', 'python', '-u', str(TOOLS / tool),
        'config.py', *place, '--launcher', 'slurm', '--cfg-options', 'a=b c',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('srun', 'code'),
    [
        ('exit 0', 0),
        ('exit 3', 3),
        ('touch here/interrupted.pth; exit 137', 75),
        ('kill -USR1 $PPID; exec sleep 9', 138),
    ],
)
def test_slurm_exit_code(tmp_path, srun, code):
    """75 if the state was saved; signals reach ``srun``."""
    (tmp_path / 'here').mkdir()
    old = tmp_path / 'here' / 'interrupted.pth'
    old.touch()
    os.utime(old, (1, 1))
    fake(tmp_path / 'srun', f'#!/bin/sh\n{srun}\n')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    args = ['part', 'job', 'config.py', 'here']
    done = run('slurm_train.sh', *args, cwd=tmp_path, PATH=path)
    assert done.returncode == code, done.stderr


def test_slurm_with_few_gpus(tmp_path):
    fake(tmp_path / 'srun')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = run('slurm_train.sh', *'pjcw', GPUS='2', PATH=path)
    assert '--gres=gpu:2' in done.stdout
    assert '--ntasks-per-node=2' in done.stdout


@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_slurm_port(tmp_path, script):
    fake(tmp_path / 'srun', '#!/bin/sh\necho "$MASTER_PORT"\n')
    path = f'{tmp_path}:{os.environ["PATH"]}'

    def port(**env):
        return int(run(script, *'pjcw', PATH=path, **env).stdout)

    assert port(PORT='1234', MASTER_PORT='5678', SLURM_JOB_ID='3') == 1234
    assert port(MASTER_PORT='5678', SLURM_JOB_ID='3') == 5678
    assert port(SLURM_JOB_ID='1020003') == 20003
    assert 20000 <= port() < 40000
    assert 'PORT (' in run(script).stderr


def fake_python(tmp_path):
    """A Python that prints the launch and does the rest for real."""
    return str(
        fake(
            tmp_path / 'python',
            '#!/bin/sh\nif [ "$1" = -c ]; then exec '
            f'"{sys.executable}" "$@"; fi\n'
            'echo "threads=$OMP_NUM_THREADS"\n' + ECHO.split('\n', 1)[1],
        )
    )


def test_dist_test_with_one_node(tmp_path):
    python = fake_python(tmp_path)
    lines = run(
        'dist_test.sh', 'c.py', 'a.pth', 64, '--out', 'o p.pkl',
        cwd=tmp_path, PYTHON=python,
    ).stdout.splitlines()  # fmt: skip
    assert lines[0] == 'threads=1'
    assert lines[1] == str(TOOLS / 'dist_run.py')
    (port,) = [v for v in lines if v.startswith('--master_port=')]
    assert int(port.split('=')[1]) > 1023
    assert '--nproc_per_node=64' in lines
    assert lines[lines.index(str(TOOLS / 'test.py')) :] == [
        str(TOOLS / 'test.py'), 'c.py', 'a.pth', '--launcher', 'pytorch',
        '--out', 'o p.pkl',
    ]  # fmt: skip


def test_dist_train_with_several_nodes(tmp_path):
    python = fake_python(tmp_path)
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1')
    out = run('dist_train.sh', 'c.py', 8, PYTHON=python, **env).stdout
    for argument in (
        '--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1',
        '--master_port=29500',
    ):  # fmt: skip
        assert argument in out.splitlines()
    out = run('dist_train.sh', 'c.py', 8, PYTHON=python, PORT='1234').stdout
    assert '--master_port=1234' in out.splitlines()


def test_own_thread_count_is_kept(tmp_path):
    python = fake_python(tmp_path)
    done = run('dist_train.sh', 'c', 1, PYTHON=python, OMP_NUM_THREADS='5')
    assert done.stdout.startswith('threads=5\n')


@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 75), ('SIGINT', 130)])
def test_torchrun_ended_by_a_signal(name, code):
    before = signal.getsignal(signal.SIGUSR1)
    dist_run = runpy.run_path(str(TOOLS / 'dist_run.py'))
    run, signum = dist_run['run'], getattr(signal, name)

    def main():
        raise dist_run['SignalException']('ended', sigval=signum)

    run.__globals__['main'] = main
    try:
        assert run() == code
    finally:
        signal.signal(signal.SIGUSR1, before)
